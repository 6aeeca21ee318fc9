"""No text of a sample ends a run, counts as a picture, or is cut by the tokenizer's settings."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from genrecal_ds.data.pair import Unusable
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.marked_chat import one_message
from tests.unit.models.test_vlm_every_family import chat
from tests.zoo import ROWS
from tests.zoo.tokenizers import BOS

pytestmark = pytest.mark.unit
PICTURE = Image.new("RGB", (32, 32), (10, 200, 90))


def placeholders(encoder):
    """By the names that transformers' processors and the test's own tokenizers give them."""
    names = ("image_token", "video_token", "audio_token", "boi_token", "fake_image_token")
    named = {getattr(encoder.processor, name, None) for name in names}
    special = {token for token in encoder.tokenizer.all_special_tokens if "image" in token.lower()}
    return sorted(token for token in named | special if isinstance(token, str))


@pytest.mark.parametrize("row", ROWS)
def test_a_text_with_a_placeholder_is_unusable_and_says_which(zoo, row):
    encoder = ChatEncoder(zoo(row), 2000)
    if not encoder.reads_images:
        assert not encoder._placeholders
        return
    tokens = placeholders(encoder)
    assert encoder.processor.image_token in tokens
    for token in tokens:
        for messages in (chat((0, f"a {token} ?", "b")), chat((0, "a ?", f"b{token}"))):
            with pytest.raises(Unusable, match="a text that holds the token") as error:
                encoder.encode(messages, [])
            assert token in str(error.value)


@pytest.mark.parametrize("row", ROWS)
def test_any_text_is_encoded_or_unusable(zoo, row):
    encoder = ChatEncoder(zoo(row), 2000)
    known = sorted({*encoder.tokenizer.get_added_vocab(), "<image>", "<video>", "</think>", "{{"})
    texts = st.lists(st.sampled_from([*known, "a", " ", "\n", "%}", "\x00", "\ue000Mark0\ue001"]),
                     max_size=4).map("".join)  # fmt: skip

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(texts, texts, st.booleans())
    def check(question, answer, has_picture):
        images = [PICTURE] if has_picture and encoder.reads_images else []
        try:
            view = encoder.encode(chat((len(images), question, answer)), images)
        except Unusable:
            return
        assert int(view.input_ids_T[-1]) in encoder.stops

    check()


def test_an_error_of_the_processor_is_a_reason(zoo, monkeypatch):
    encoder = ChatEncoder(zoo("qwen2_vl"), 2000)

    def fails(**options):
        raise ValueError("Mismatch in\n token count")

    monkeypatch.setattr(encoder, "processor", fails)
    with pytest.raises(Unusable, match="the processor refuses the chat: Mismatch in token count"):
        encoder.encode(chat((0, "a", "b")), [])


@pytest.mark.parametrize("row", ["qwen2_vl", "internvl", "llama"])
def test_truncation_and_padding_in_tokenizer_json_never_act(zoo, row, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo(row), folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=90, pad_id=0)
    tokenizer.save(str(path))
    messages = chat((0, "a longer question than seven tokens ?", "7"))
    found, known = (ChatEncoder(of, 500) for of in (folder, zoo(row)))
    whole = [encoder.encode(messages, []).input_ids_T.tolist() for encoder in (found, known)]
    asked = [
        encoder.prompt(messages[:1], [])["input_ids"][0].tolist() for encoder in (found, known)
    ]
    for ours, theirs in (whole, asked):
        assert ours == theirs and len(ours) > 7


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("row", ["internvl", "llama"])
def test_bos_stands_where_transformers_would_put_it(zoo, row, writes, tmp_path):
    """A processor lets the tokenizer write it where the template has not; a tokenizer does not."""
    folder = tmp_path / "model"
    shutil.copytree(zoo(row), folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(path))
    if not writes:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().removeprefix(BOS))
    encoder = ChatEncoder(folder, 500)
    messages = chat((0, "what ?", "it is 7"), (0, "and ?", "8"))
    view = encoder.encode(messages, [])
    processor = encoder.processor if encoder.reads_images else encoder.tokenizer
    options = {"tokenize": True, "return_dict": True}
    theirs = processor.apply_chat_template(
        messages, chat_template=encoder.template.source, **options
    )["input_ids"]
    theirs = theirs[0] if isinstance(theirs[0], list) else theirs
    assert view.input_ids_T.tolist() == list(theirs)[: len(view.input_ids_T)]
    num_bos = view.input_ids_T.tolist().count(encoder.tokenizer.bos_token_id)
    assert num_bos == (1 if writes or row == "internvl" else 0)
    for (start, end), answer in zip(view.answers, ("it is 7", "8"), strict=True):
        assert encoder.tokenizer.decode(view.input_ids_T[start : end - 1]).strip() == answer
    prompt = encoder.prompt(messages[:1], [])["input_ids"][0].tolist()
    assert prompt == view.input_ids_T[: view.answers[0][0]].tolist()


def test_a_string_as_content_is_checked_as_well(zoo):
    encoder = ChatEncoder(zoo("internvl"), 500)
    messages = [{"role": "user", "content": f"a {encoder.processor.image_token}"},
                one_message("assistant", "b")]  # fmt: skip
    with pytest.raises(Unusable, match="a text that holds the token"):
        encoder.encode(messages, [])


def test_a_stale_stop_token_that_is_a_piece_of_text_ends_nothing(zoo, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama"), folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    encoder = ChatEncoder(folder, 500)
    piece = encoder.tokenizer("7", add_special_tokens=False)["input_ids"][0]
    path.write_text(json.dumps({**config, "eos_token_id": [config["eos_token_id"], piece]}))
    view = ChatEncoder(folder, 500).encode(chat((0, "a", "7 and 7")), [])
    ((start, end),) = view.answers
    assert encoder.tokenizer.decode(view.input_ids_T[start : end - 1]) == "7 and 7"
