"""Templates with the habits of released ones, and the text that each teaches, written by hand."""

from pathlib import Path

import pytest

from genrecal_ds.data.pair import Unusable
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat_template import ChatTemplate
from genrecal_ds.models.marked_chat import one_message

pytestmark = pytest.mark.unit
END = "[end]"


def template(source: str, image_token: str | None = None, eos: str | None = END) -> ChatTemplate:
    special = [
        END,
        "[over]",
        "[channel]",
        "[user]",
        "[bot]",
        *([image_token] if image_token else []),
    ]
    return ChatTemplate(Path("m"), source, {"bos_token": "[bos]"}, image_token, special, [END], eos)


def taught(of: ChatTemplate, messages: list, last_turn: bool = False) -> list[tuple[str, str]]:
    """(what stands before each answer, the answer up to its end), of the whole text."""
    text, starts = of.render(messages, last_turn)
    return [(text[:start], text[start : text.index(END, start) + len(END)]) for start in starts]


def talk(*texts: str, system: str | None = None) -> list:
    chat = [one_message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return chat if system is None else [one_message("system", system), *chat]


LOOP = "{% for m in messages %}"
STRINGS = (
    LOOP
    + "{{ '[' + m.role + ']' + m.content + '[end]\n' }}{% endfor %}"
    + ("{% if add_generation_prompt %}[assistant]{% endif %}")
)
PARTS = (
    LOOP
    + "[{{ m.role }}]{% for p in m.content %}{% if p.type == 'image' %}<pic>{% else %}"
    + (
        "{{ p.text }}{% endif %}{% endfor %}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
)
TRIMMED = STRINGS.replace("m.content", "(m.content | trim)")


@pytest.mark.parametrize("source", [STRINGS, PARTS], ids=["strings", "parts"])
@pytest.mark.parametrize("as_string", [False, True])
def test_contents_are_what_the_template_reads(source, as_string):
    messages = talk("a ?", "b", "c ?", " d\n")
    if as_string:  # the data may have either, too
        messages = [{**m, "content": m["content"][0]["text"]} for m in messages]
    first, second = taught(template(source), messages)
    assert first == ("[user]a ?[end]\n[assistant]", "b[end]")
    assert second[0] == "[user]a ?[end]\n[assistant]b[end]\n[user]c ?[end]\n[assistant]"
    assert second[1] == " d\n[end]"
    prompt = template(source).prompt(messages[:3])
    assert prompt == second[0]


def test_a_text_may_stand_as_parts_for_one_role_and_as_a_string_for_another():
    source = LOOP + (
        "[{{ m.role }}]{% if m.role == 'user' %}{{ m.content[0].text }}"
        "{% else %}{{ '' + m.content }}{% endif %}[end]{% endfor %}"
    )
    of = template(source)
    assert of.content == {"user": "parts", "assistant": "string", "system": "string"}
    ((prompt, answer),) = taught(of, talk("a ?", "b", system="s"))
    assert (prompt, answer) == ("[system]s[end][user]a ?[end][assistant]", "b[end]")


def test_a_picture_in_a_string_has_a_line_of_its_own():
    of = template(STRINGS, "<pic>")
    messages = [one_message("user", "what ?", num_images=2), one_message("assistant", "b")]
    assert taught(of, messages)[0][0] == "[user]<pic>\n<pic>\nwhat ?[end]\n[assistant]"
    assert taught(template(PARTS, "<pic>"), messages)[0][0] == (
        "[user]<pic><pic>what ?[end]\n[assistant]"
    )


def test_blanks_that_a_template_trims_are_no_part_of_the_answer():
    of = template(TRIMMED)
    (prompt, answer), _ = taught(of, talk(" a\n?  ", "\n b  b \n", "c", "d"))
    assert (prompt, answer) == ("[user]a\n?[end]\n[assistant]", "b  b[end]")


def test_words_that_a_template_adds_to_the_prompt_are_no_part_of_the_answer():
    source = "{{ bos_token }}{% if messages[0].role != 'system' %}[system]help[end]\n{% endif %}"
    ((prompt, answer),) = taught(template(source + STRINGS), talk("help", "help"))
    assert (
        prompt == "[bos][system]help[end]\n[user]help[end]\n[assistant]" and answer == "help[end]"
    )


def test_the_date_is_the_same_on_every_day():
    source = "\n{{ 'On ' + strftime_now('%d %b %Y') + '.' }}" + STRINGS
    ((prompt, _),) = taught(template(source), talk("a", "b"))
    assert prompt == "\nOn 26 Jul 2024.[user]a[end]\n[assistant]"


# Reasoning as Qwen3's template has it: an empty block before the last answer, none before earlier.
THINKS = (
    LOOP + "[{{ m.role }}]{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if not thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ASKS_TO_THINK = THINKS.replace("{% if not thinking %}", "").replace(
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}", "{{ '<think>\n' }}{% endif %}"
)
SAYS_NOTHING = THINKS.replace("{% if not thinking %}", "{% if thinking %}")


@pytest.mark.parametrize("source", [THINKS, ASKS_TO_THINK, SAYS_NOTHING])
def test_an_empty_block_of_reasoning_is_prompt_and_one_that_holds_some_is_answer(source):
    of = template(source)
    empty = ("[user]a[end][assistant]<think>\n\n</think>\n\n", "b[end]")
    assert taught(of, talk("a", "b")) == [empty]
    assert of.prompt(talk("a")) == empty[0]
    full = "<think>\nas it is\n</think>\n\nb"
    assert taught(of, talk("a", full)) == [("[user]a[end][assistant]", full + END)]


def test_a_template_that_rewrites_turns_teaches_each_as_if_it_were_the_last():
    of = template(THINKS)
    messages = talk("a", "<think>\nr\n</think>\n\nb", "c", "d")
    assert of.rewrites(messages) and not of.rewrites(messages[:2])
    with pytest.raises(Unusable, match="rewrites earlier turns"):
        of.render(messages)
    ((prompt, answer),) = taught(of, messages, last_turn=True)
    assert prompt == "[user]a[end][assistant]b[end][user]c[end][assistant]<think>\n\n</think>\n\n"
    assert answer == "d[end]"
    assert not template(STRINGS).rewrites(messages)


def test_another_end_for_earlier_turns_rewrites_them_as_well():
    source = LOOP + (
        "[{{ m.role }}]{% if m.role == 'assistant' %}[channel]final{% endif %}{{ '' + m.content }}"
        "{{ '[end]' if loop.last else '[over]' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    of = template(source)
    assert of.rewrites(talk("a", "b", "c", "d"))
    ((prompt, answer),) = taught(of, talk("a", "b", "c", "d"), last_turn=True)
    assert prompt.endswith("[channel]finalb[over][user]c[over][assistant][channel]final")
    assert answer == "d[end]"


def test_where_turns_end_with_nothing_the_stop_token_is_appended():
    source = LOOP + (
        "{{ m.role.upper() }}: {{ '' + m.content }}{% if m.role == 'assistant' %} {% endif %}"
        "{% if m.role == 'user' %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    first, second = taught(template(source), talk("a", "b", "c", "d"))
    # The blank behind the colon is what generation has to say first: its prompt has none.
    assert first == ("USER: a\nASSISTANT:", " b[end]")
    assert second == ("USER: a\nASSISTANT: b[end] USER: c\nASSISTANT:", " d[end]")
    with pytest.raises(UserError, match="no end-of-turn after an answer, and its tokenizer has no"):
        template(source, eos=None)
    with pytest.raises(UserError, match=r"ends an answer with \[over\].*generation_config.json"):
        template(STRINGS.replace("[end]", "[over]"))


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    + STRINGS
)


def test_a_chat_that_a_template_refuses_is_one_sample_with_a_reason():
    of = template(STRICT)
    with pytest.raises(Unusable, match="refuses the chat: No system role"):
        of.render(talk("a", "b", system="s"))
    assert len(taught(of, talk("a", "b"))) == 1
    with pytest.raises(Unusable, match="the last message is not the assistant's"):
        of.render(talk("a", "b", "c"))


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (LOOP + "{% if m.role != 'system' %}[{{ m.role }}]{{ '' + m.content }}[end]{% endif %}"
         "{% endfor %}", talk("a", "b", system="s"), "drops or alters a system prompt"),
        (LOOP + "{% if loop.index > 2 or loop.length == 2 %}[{{ m.role }}]{{ '' + m.content }}"
         "[end]{% endif %}{% endfor %}", talk("a", "b", "c", "d"), "drops or alters a question"),
        (LOOP + "{% if loop.last or m.role == 'user' %}[{{ m.role }}]{{ '' + m.content }}[end]"
         "{% endif %}{% endfor %}", talk("a", "b", "c", "d"), "drops or alters an answer"),
        (LOOP + "[{{ m.role }}]{{ m.content + (m.content if loop.length > 2 else '') }}[end]"
         "{% endfor %}", talk("a", "b", "c", "d"), "repeats a question"),
        (STRINGS.replace("m.content", "m.content.replace('q', 'y')"), talk("a q", "b"),
         "alters a question"),
        (STRINGS.replace("m.content", "m.content.split('|')[0]"), talk("a", "b|c"),
         "alters an answer"),
        (LOOP + "[{{ m.role }}]{{ '' + m.content }}{{ ' (by a model)' if m.role == 'assistant' and "
         "loop.length > 2 else '' }}[end]{% endfor %}", talk("a", "b", "c", "d"),
         r"writes '\(by a model\)' behind an answer"),
    ],
)  # fmt: skip
def test_what_a_template_drops_alters_or_adds_makes_a_sample_unusable(source, messages, reason):
    of = template(source)
    assert len(taught(of, talk("e", "f"))) == 1
    with pytest.raises(Unusable, match=reason):
        of.render(messages)


def test_a_question_that_is_dropped_is_seen_though_its_words_stand_elsewhere():
    source = (
        "help "
        + LOOP
        + (
            "{% if m.role != 'system' %}[{{ m.role }}]{{ '' + m.content }}[end]{% endif %}"
            "{% endfor %}"
        )
    )
    with pytest.raises(Unusable, match="drops or alters a system prompt"):
        template(source).render(talk("a", "b", system="help"))


def test_a_system_prompt_may_stand_before_the_last_question():
    source = (
        "{% set ns = namespace(s='') %}" + LOOP + "{% if m.role == 'system' %}"
        "{% set ns.s = m.content + '|' %}"
        "{% elif loop.index >= loop.length - 1 and m.role == 'user' %}"
        "[user]{{ ns.s + m.content }}[end]"
        "{% else %}[{{ m.role }}]{{ '' + m.content }}[end]{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    of = template(source)
    messages = talk("a", "b", "c", "d", system="s")
    assert of.rewrites(messages)
    ((prompt, _),) = taught(of, messages, last_turn=True)
    assert prompt == "[user]a[end][assistant]b[end][user]s|c[end][assistant]"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOP + "[{{ m.role }}]{{ '' + m.content }}. Over.[end]{% endfor %}",
         "writes '. Over.' behind an answer"),
        ("the same for every chat", "drops or alters a question"),
        (STRINGS.replace("m.content", "(m.content | upper)"), "drops or alters a question"),
        ("{{ messages }}[end]", "drops or alters|prints the parts|by its words"),
        ("{% for x in %}", "refuses the chat: Expected an expression"),
    ],
)  # fmt: skip
def test_a_template_that_teaches_no_chat_is_refused_in_one_line(source, reason):
    with pytest.raises(UserError, match=reason) as error:
        template(source)
    assert "\n" not in str(error.value) and str(error.value).startswith("m: ")


def test_many_forms_of_chat_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("genrecal_ds.models.chat_template.KEPT_FORMS", 3)
    of = template(STRINGS)
    for turns in range(1, 9):
        chat = talk(*("a", "b") * turns)
        assert len(taught(of, chat)) == turns and len(of._forms) <= 3
