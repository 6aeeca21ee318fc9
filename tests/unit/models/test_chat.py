"""Answer spans by characters: three kinds of tokenizers, two kinds of templates."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from genrecal_ds.data.pair import Unusable
from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from launch.demo.pair import STUDENT_SPECIAL
from tests.fixtures import texts_of_digits
from tests.unit.models.test_vlm_every_family import chat

pytestmark = pytest.mark.unit
PICTURE = Image.new("RGB", (32, 32), (10, 200, 90))
ANSWERS = ["3 plus 8 is 11", "it is 7", "\u00e9t\u00e9 4 \u4e2d 2", " 12 "]


def conversation(answers, image=True):
    messages = []
    for turn, answer in enumerate(answers):
        picture = [{"type": "image"}] if turn == 0 and image else []
        question = {"type": "text", "text": f"what digit is number {turn} ?"}
        messages.append({"role": "user", "content": [*picture, question]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def unigram_student(folder, out):
    """The student with a unigram tokenizer in place of its BPE, same special tokens."""
    shutil.copytree(folder, out)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", *STUDENT_SPECIAL]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[AddedToken(t, special=True) for t in special],
        unk_token="<unk>", show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([*texts_of_digits(300), *ANSWERS * 3], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", unk_token="<unk>",
        extra_special_tokens={
            "start_image_token": "<image>", "end_image_token": "</image>",
            "context_image_token": "<image_context>", "video_token": "<video>",
        },
    )  # fmt: skip
    fast.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def encoders(pair, tmp_path_factory):
    unigram = unigram_student(pair / "student_init", tmp_path_factory.mktemp("u") / "unigram")
    return {
        "byte-level BPE, generation block": ChatEncoder(pair / "teacher_init", 500),
        "sentencepiece BPE, prefixes": ChatEncoder(pair / "student_init", 500),
        "unigram, prefixes": ChatEncoder(unigram, 500),
    }


def test_text_that_holds_the_image_token_is_unusable(pair):
    for side in ("teacher_init", "student_init"):
        encoder = ChatEncoder(pair / side, 100)
        token = encoder.processor.image_token
        messages = [
            {"role": "user", "content": [{"type": "text", "text": f"what is {token} ?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "it is 3"}]},
        ]
        with pytest.raises(Unusable, match="a text that holds the token"):
            encoder.encode(messages, [])


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_same_text_gives_the_same_answers_with_every_tokenizer(encoders, count, image):
    messages = conversation(ANSWERS[:count], image)
    splits = set()
    for name, encoder in encoders.items():
        chat = encoder.encode(messages, [PICTURE] if image else [])
        assert len(chat.answers) == count, name
        ids = chat.input_ids_T
        assert chat.answers[-1][1] == len(ids)  # nothing after the last end-of-turn
        for (start, end), answer in zip(chat.answers, ANSWERS, strict=False):
            assert ids[end - 1] == encoder.end_of_turn
            assert encoder.end_of_turn not in ids[start : end - 1]
            # By characters of the rendered text: decoding may drop or merge spaces.
            span = source_text(encoder, messages, image, start, end - 1)
            assert span.strip() == answer.strip(), name
        assert all(start < end for start, end in chat.questions)
        splits.add(tuple(end - start for start, end in chat.answers))
    assert len(splits) > 1, "the tokenizers split alike: the test shows nothing"


def source_text(encoder, messages, image, start, end):
    """Characters of the rendered text that tokens start..end-1, after all pictures, come from."""
    text, _ = encoder.template.render(messages)
    encoding = encoder._tokenize(text, [PICTURE] if image else [])
    gain = 0
    if image:
        last = encoding["text_replacement_offsets"][0][-1]
        gain = last["new_span"][1] - last["span"][1]
    offsets = encoding["offset_mapping"][0]
    return text[offsets[start][0] - gain : offsets[end - 1][1] - gain]


def test_a_picture_becomes_different_numbers_of_tokens(encoders):
    lengths = {
        name: int((encoder.encode(conversation(["7"]), [PICTURE]).input_ids_T
                   == encoder.processor.image_token_id).sum())
        for name, encoder in encoders.items()
    }  # fmt: skip
    assert lengths["byte-level BPE, generation block"] == 4
    assert lengths["sentencepiece BPE, prefixes"] == 20


def test_unusable_chats_have_a_reason(encoders):
    encoder = encoders["sentencepiece BPE, prefixes"]
    with pytest.raises(Unusable, match="not the assistant's"):
        encoder.encode(conversation(["7"])[:1], [PICTURE])
    messages = conversation(["7"])
    messages[1]["content"].append({"type": "image"})
    with pytest.raises(Unusable, match="image inside an answer"):
        encoder.encode(messages, [PICTURE, PICTURE])
    with pytest.raises(Unusable, match="holds the end-of-turn"):
        encoder.encode(conversation(["7<end>8", "9"]), [PICTURE])


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
            "drops or alters a question",
        ),
        ("{{ messages | length }}", "drops or alters a question"),
        ("{% for m in messages %}{{ m.content[0].text | upper }}<end>{% endfor %}", "alters"),
    ],
)
def test_templates_that_hide_the_answers_are_refused(pair, tmp_path, template, message):
    folder = tmp_path / "model"
    shutil.copytree(pair / "student_init", folder)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message) as error:
        ChatEncoder(folder, 100)
    assert str(folder) in str(error.value)


def test_prompt_ends_where_the_answer_begins(encoders):
    messages = conversation(["it is 7"])
    for encoder in encoders.values():
        prompt = encoder.prompt(messages[:1], [PICTURE])["input_ids"][0]
        chat = encoder.encode(messages, [PICTURE])
        start = chat.answers[0][0]
        assert prompt.tolist() == chat.input_ids_T[:start].tolist()


# With {% generation %} in the template and without; with pictures, and text alone.
WAYS = ["qwen2_vl", "internvl", "qwen2", "llama"]


@pytest.mark.parametrize("row", WAYS)
def test_system_prompt_and_several_pictures_in_each_way(zoo, row):
    encoder = ChatEncoder(zoo(row), 2000)
    counts = (2, 0, 3) if encoder.reads_images else (0, 0, 0)
    turns = [(count, "what ?", answer) for count, answer in zip(counts, ANSWERS, strict=False)]
    plain, prompted = chat(*turns), chat(*turns, system="be short")
    images = [PICTURE] * sum(counts)
    found = [encoder.encode(messages, images) for messages in (plain, prompted)]
    # The system prompt is question, and moves everything behind it alike.
    added = len(found[1].input_ids_T) - len(found[0].input_ids_T)
    assert added > 0 and len(found[0].answers) == 3
    assert found[1].answers == tuple((a + added, b + added) for a, b in found[0].answers)
    for view in found:
        assert all(view.input_ids_T[end - 1] == encoder.end_of_turn for _, end in view.answers)
    # Pictures lie in the questions of their own turns.
    per_turn = [
        encoder.num_visual(replace(found[1], input_ids_T=found[1].input_ids_T[start:end]))
        for start, end in found[1].questions
    ]
    assert sum(per_turn) == encoder.num_visual(found[1])
    assert [bool(visual) for visual in per_turn] == [bool(count) for count in counts]
    if encoder.reads_images:
        assert per_turn[0] * 3 == per_turn[2] * 2


@pytest.mark.parametrize("row", WAYS)
def test_what_is_no_chat_of_the_model_is_refused_in_each_way(zoo, row):
    encoder = ChatEncoder(zoo(row), 2000)
    messages = chat((0, "x ?", "7"), (0, "y ?", "8"))
    assert len(encoder.encode(messages, []).answers) == 2
    messages[1]["content"].append({"type": "image"})
    images = [PICTURE] if encoder.reads_images else []
    with pytest.raises(Unusable, match="image inside an answer"):
        encoder.encode(messages, images)
    if not encoder.reads_images:
        with pytest.raises(Unusable, match="reads text only"):
            encoder.encode(chat((1, "x ?", "7")), [PICTURE])


@pytest.mark.parametrize("kind", ["byte_bpe", "spm_bpe", "unigram"])
def test_a_special_token_that_swallows_blanks_is_no_part_of_the_answer(zoo, kind, tmp_path):
    """Phi-3's tokens do (rstrip), and its template writes a line break behind them."""
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama", kind), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|bot|>", "<|bot|>\n"))
    encoder = ChatEncoder(folder, 500)
    bot = encoder.tokenizer.convert_tokens_to_ids("<|bot|>")
    view = encoder.encode(chat((0, "x ?", "  it is 7"), (0, "y", " ")), [])
    assert all(view.input_ids_T[start - 1] == bot for start, _ in view.answers)
    prompt = encoder.prompt(chat((0, "x ?", "7"))[:1], [])["input_ids"][0]
    assert prompt.tolist() == view.input_ids_T[: view.answers[0][0]].tolist()
