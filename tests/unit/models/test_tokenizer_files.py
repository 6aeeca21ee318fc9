"""A folder's tokenizer files against the packages they come from, and files that would be misread.

Each case that is refused here is one that transformers loads without a word.
"""

import base64
import json
import random
import shutil

import pytest
import sentencepiece
import tiktoken
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from genrecal_ds.errors import UserError
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.processors import load_tokenizer
from genrecal_ds.models.tokenizer_files import PROBE
from tests.unit.models.test_chat_answer_masks import check_mask
from tests.unit.models.test_vlm_every_family import chat
from tests.zoo.tokenizers import texts

pytestmark = pytest.mark.unit
AS_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "byte_fallback": True}  # fmt: skip


def sentences(count=200):
    """Words and blanks of the training text, and characters that it never saw."""
    words = sorted({word for text in texts() for word in text.split()})
    draw = random.Random(0)
    parts = [*words, " ", "  ", "\n", "\u4e2d\u6587", "\U0001f600", "\u00df", "12", "e\u0301"]
    return [" ".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(count)]


def sentencepiece_file(path, kind, **spec):
    """A tokenizer.model of that kind; normalised as released language models are, unless told."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts(), PROBE]), model_prefix=str(path.with_suffix("")),
        model_type=kind, vocab_size=400, hard_vocab_limit=False, minloglevel=2,
        **{**AS_LLAMA, **spec},
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def model_folder(folder, model_type="llama", **tokenizer_config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def refusal(folder):
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, named",
    [("unigram", "LlamaTokenizer"), ("unigram", "GemmaTokenizer"), ("bpe", "T5Tokenizer")],
)
def test_a_sentencepiece_file_of_another_kind_than_the_class_is_refused(tmp_path, kind, named):
    folder = model_folder(tmp_path / "model", tokenizer_class=named)
    sentencepiece_file(folder / "tokenizer.model", kind)
    message = refusal(folder)
    assert f"{folder}/tokenizer.model: a {kind.upper()} model, and {named} reads it as" in message
    assert "tokenizer.json" in message  # the fix


def test_a_sentencepiece_file_alone_gives_the_ids_of_sentencepiece(tmp_path):
    folder = model_folder(tmp_path / "model", tokenizer_class="LlamaTokenizer")
    raw = sentencepiece_file(folder / "tokenizer.model", "bpe")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_fast
    # transformers adds no blank in front of one that is there.
    for text in (text for text in sentences() if not text.startswith(" ")):
        assert ids_of(tokenizer, text) == raw.encode(text), text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_plain_fast_tokenizer_that_drops_the_blank_in_front_is_refused(tmp_path, kind):
    folder = model_folder(tmp_path / "model", tokenizer_class="PreTrainedTokenizerFast")
    sentencepiece_file(folder / "tokenizer.model", kind)
    assert "splits text otherwise than this file ('3' for '\\u25813')" in refusal(folder)
    raw = sentencepiece_file(folder / "tokenizer.model", kind, add_dummy_prefix=False)
    tokenizer = load_tokenizer(folder)
    assert ids_of(tokenizer, PROBE) == raw.encode(PROBE)


def test_a_class_that_leaves_out_the_normalisation_of_its_file_is_refused(tmp_path):
    folder = model_folder(tmp_path / "model", tokenizer_class="LlamaTokenizer")
    spec = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    sentencepiece_file(folder / "tokenizer.model", "bpe", **spec)
    assert "splits text otherwise than this file" in refusal(folder)


@pytest.mark.parametrize("named", ["BertGenerationTokenizer", "SiglipTokenizer", "ByT5Tokenizer"])
def test_a_tokenizer_without_offsets_is_refused_and_the_fix_helps(zoo, tmp_path, named):
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama"), folder)
    (folder / "tokenizer.json").unlink()
    raw = sentencepiece_file(folder / "tokenizer.model", "bpe")
    shutil.copy(folder / "tokenizer.model", folder / "spiece.model")  # one name per class
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "tokenizer_class": named}))
    message = refusal(folder)
    assert f"{folder}: {named} gives no character offsets" in message
    assert "set tokenizer_class in tokenizer_config.json to" in message
    assert "LlamaTokenizer" in message
    said |= {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    encoder = ChatEncoder(folder, 100)
    assert ids_of(encoder.tokenizer, PROBE) == raw.encode(PROBE)
    found = check_mask(encoder, chat((0, "3 plus 8?", "is 11"), (0, "\u4e2d", "caf\u00e9 7")))
    assert len(found.answers) == 2


def test_a_tiktoken_file_gives_the_ids_of_tiktoken(tmp_path, zoo):
    folder = model_folder(tmp_path / "model")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in sorted({word for text in texts() for word in text.split()}):
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
            ranks.setdefault(b" " + word.encode()[: end - 1], len(ranks))
    lines = [base64.b64encode(word) + b" %d\n" % rank for word, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    raw = tiktoken.Encoding(
        "test", pat_str=TikTokenConverter().pattern, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = load_tokenizer(folder)
    merged = 0
    for text in sentences():
        assert ids_of(tokenizer, text) == raw.encode(text), text
        merged += len(text.encode()) - len(raw.encode(text))
    assert merged > 1000  # or the file would only have been read as bytes


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "internvl"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, model_type):
    folder = model_folder(tmp_path / "model", model_type)
    message = refusal(folder)
    assert str(folder) in message and "copy" in message


def test_another_tokenizer_than_the_familys_own_is_refused_or_read_as_it_is(zoo):
    """transformers reads every qwen2 folder as Qwen2Tokenizer, which drops blanks of a Llama's."""
    assert "Qwen2Tokenizer splits text otherwise" in refusal(zoo("qwen2", "spm_bpe"))
    for kind in ("byte_bpe", "unigram", "tiktoken"):
        folder = zoo("qwen2", kind)  # saved as a plain tokenizer.json, and says so
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        for text in sentences(20):
            assert ids_of(tokenizer, text) == raw.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("row", ["llama", "internvl"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(zoo, tmp_path, row):
    folder = tmp_path / "model"
    shutil.copytree(zoo(row), folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    size = text["vocab_size"]
    for rows in (size + 64, size):  # padding rows are usual
        text["vocab_size"] = rows
        (folder / "config.json").write_text(json.dumps(config))
        ChatEncoder(folder, 100)
    text["vocab_size"] = size - 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        ChatEncoder(folder, 100)
    message = str(error.value)
    assert f"up to {size - 1}, " in message and f"vocab_size is {size - 1};" in message
    assert str(folder) in message and "\n" not in message
