"""Random conversations through every row of the zoo: which characters the answer tokens cover.

The reference knows nothing of ChatEncoder: it renders the chat with marks in place of the
answers, puts answers and pictures back by hand, tokenises that text again and compares spans of
characters. Nothing is decoded: decoding drops and merges blanks.
"""

import re
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genrecal_ds.data.pair import EncodedChat, encode_pair
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from tests.unit.models.test_vlm_every_family import chat
from tests.zoo import ROWS
from tests.zoo.tokenizers import BOS

pytestmark = pytest.mark.unit
KINDS = ("byte_bpe", "spm_bpe", "unigram")
COMBINATIONS = [(row, kind) for row in ROWS for kind in KINDS]
COMBINATIONS += [("qwen2_vl", "tiktoken"), ("llama", "tiktoken")]
REFUSED = {("qwen2", "spm_bpe")}  # transformers puts Qwen2Tokenizer in place of LlamaTokenizer
PICTURES = [Image.new("RGB", size, (10, 200, 90)) for size in ((32, 32), (64, 32), (32, 48))]

words = st.text(
    st.sampled_from("ab3 ,.\n\u00e9\u0301\u4e2d\u6587\u00df\U0001f600\U0001f44d\u00a0<|"),
    max_size=12,
)
answers = st.one_of(
    words, st.sampled_from([".", "", " ", "\n", " 12 ", "it is 7", "\u00e9t\u00e9\n"])
)
turns = st.lists(st.tuples(st.integers(0, 3), words, answers), min_size=1, max_size=4)
systems = st.one_of(st.none(), st.just("be short"), words)


class Reference(NamedTuple):
    """A whole chat as text, pictures expanded; its tokens; the characters of its answers."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    answers: list[tuple[int, int]]


@cache
def encoder(folder: Path) -> ChatEncoder:
    return ChatEncoder(folder, 100_000)


def pictures(messages) -> list[Image.Image]:
    parts = [part for message in messages for part in message["content"]]
    count = sum(part["type"] == "image" for part in parts)
    return [PICTURES[number % len(PICTURES)] for number in range(count)]


def with_offsets(tokenizer, text):
    """(ids, spans)."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def reference(of: ChatEncoder, messages) -> Reference:
    def render(chat):
        return of.tokenizer.apply_chat_template(
            chat, chat_template=of.template.source, tokenize=False
        )

    given, marked = [], []
    for message in messages:
        if message["role"] == "assistant":
            given.append(message["content"][0]["text"])
            mark = {"type": "text", "text": f"\ue000{len(given)}\ue001"}
            message = {"role": "assistant", "content": [mark]}
        marked.append(message)
    between = re.split("\ue000[0-9]+\ue001", render(marked))
    assert len(between) == len(given) + 1
    whole = between[0] + "".join(a + b for a, b in zip(given, between[1:], strict=True))
    assert whole == render(messages)  # these templates write an answer as it is
    images = pictures(messages)
    if images:
        encoding = of.processor(
            text=[whole], images=images, return_text_replacement_offsets=True, return_tensors="pt"
        )
        replacements = iter([r["replacement"] for r in encoding["text_replacement_offsets"][0]])
        image = re.escape(encoding["text_replacement_offsets"][0][0]["text"])
        between = [re.sub(image, lambda _: next(replacements), part) for part in between]
    if "Molmo2" in type(of.processor).__name__ and not whole.startswith(BOS):
        between[0] = BOS + between[0]  # written by the processor, so it is what the model reads
    text, places = between[0], []
    for answer, part in zip(given, between[1:], strict=True):
        places.append((len(text), len(text) + len(answer)))
        text += answer + part
    return Reference(text, *with_offsets(of.tokenizer, text), places)


def check_mask(of: ChatEncoder, messages, may_straddle: bool = False) -> EncodedChat:
    found = of.encode(messages, pictures(messages))
    expected = reference(of, messages)
    length = len(found.input_ids_T)
    assert found.input_ids_T.tolist() == expected.ids[:length]
    assert len(found.answers) == len(expected.answers)
    parts = sorted([*found.questions, *found.answers])
    assert parts[0][0] == 0 and parts[-1][1] == length
    assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
    end_token = of.tokenizer.convert_ids_to_tokens(of.end_of_turn)
    for (start, end), (first, last) in zip(found.answers, expected.answers, strict=True):
        spans = expected.spans[start : end - 1]
        ends_at = expected.spans[end - 1][0]
        # The end-of-turn, right behind the answer.
        assert expected.text[slice(*expected.spans[end - 1])] == end_token and ends_at == last
        covered = {char for span in spans for char in range(*span)}
        assert covered >= set(range(first, last))
        if may_straddle and spans and spans[0][0] < first:  # one token over the boundary, no more
            assert spans[0][1] > first or not last > first
            covered -= set(range(spans[0][0], first))
        assert covered == set(range(first, last))
    inside = {char for place in expected.answers for char in range(*place)}
    for start, end in found.questions:
        for span in expected.spans[start:end]:
            assert not inside & set(range(*span))
    return found


def counterpart(zoo, row: str, sees: bool) -> ChatEncoder:
    """Another family with another tokenizer, of those that see as much."""
    first, second = ("internvl", "qwen2_vl") if sees else ("llama", "qwen3")
    return encoder(zoo(second, "tiktoken") if row == first else zoo(first, "spm_bpe"))


@pytest.mark.parametrize("row, kind", COMBINATIONS)
def test_answer_tokens_cover_the_answer_and_nothing_else(zoo, row, kind):
    if (row, kind) in REFUSED:
        with pytest.raises(UserError, match="splits text otherwise"):
            encoder(zoo(row, kind))
        return
    one = encoder(zoo(row, kind))
    other = counterpart(zoo, row, one.reads_images)

    @settings(max_examples=20, derandomize=True, deadline=None, database=None)
    @given(turns=turns, system=systems)
    def check(turns, system):
        if not one.reads_images:
            turns = [(0, *texts) for _, *texts in turns]
        if one.is_prefix_lm:
            turns = turns[:1]
        messages = chat(*turns, system=system)
        found = check_mask(one, messages, may_straddle=one.is_prefix_lm)  # "\n" ends its questions
        pair = encode_pair(messages, pictures(messages), {"teacher": other, "student": one})
        assert len(pair.teacher.answers) == len(pair.student.answers) == len(turns)
        assert pair.student.answers == found.answers

    check()


PLAIN = (
    "{% for m in messages %}{% for part in m.content %}{% if loop.first %}"
    "{{ 'A: ' if m.role == 'assistant' else 'Q: ' }}{% endif %}{{ part.text }}{% endfor %}"
    "{{ '<|end|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


@pytest.mark.parametrize("kind", [*KINDS, "tiktoken"])
def test_at_most_one_token_straddles_where_plain_text_ends_the_prompt(zoo, kind, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama", kind), folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    one, straddled = ChatEncoder(folder, 100_000), []

    @settings(max_examples=40, derandomize=True, deadline=None, database=None)
    @given(turns=turns)
    def check(turns):
        messages = chat(*((0, *texts) for _, *texts in turns))
        found = check_mask(one, messages, may_straddle=True)
        text = reference(one, messages)
        starts = [text.spans[start][0] for start, _ in found.answers]
        straddled.append(any(a < b for a, (b, _) in zip(starts, text.answers, strict=True)))

    check()
    # The unigram vocabulary has no piece that starts with a blank.
    assert any(straddled) == (kind != "unigram")
