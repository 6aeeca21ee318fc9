"""Tokenizers of every kind that people's models have, trained here on a few lines of text."""

import tempfile
from pathlib import Path
from typing import Literal, get_args

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests.fixtures import texts_of_digits

Kind = Literal["byte_bpe", "tiktoken", "spm_bpe", "unigram"]
KINDS: tuple[Kind, ...] = get_args(Kind)
USER, BOT, SYSTEM, END, BOS, UNK = "<|user|>", "<|bot|>", "<|system|>", "<|end|>", "<s>", "<unk>"
ALWAYS = [UNK, BOS, END, USER, BOT, SYSTEM]
SPLIT = r"\s?\p{L}+|\s?\p{N}|\s?[^\s\p{L}\p{N}]+|\s+"  # of the tiktoken kind


def texts() -> list[str]:
    return [*texts_of_digits(200), "\u00e9t\u00e9 4 \u4e2d 2", "naive, caf\u00e9 ?", " 12 "] * 2


def train(kind: Kind, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows `special` whole, beside the template's own tokens.

    named: a processor's names for some of them, as image_token="<image>".
    """
    tokens = [*ALWAYS, *(token for token in special if token not in ALWAYS)]
    common = dict(
        bos_token=BOS, eos_token=END, unk_token=UNK, pad_token=END,
        additional_special_tokens=tokens, extra_special_tokens=named,
    )  # fmt: skip
    if kind == "spm_bpe":
        return _sentencepiece(tokens, common)
    if kind == "unigram":
        return PreTrainedTokenizerFast(tokenizer_object=_unigram(tokens), **common)
    bpe = _byte_level_bpe(tokens)
    if kind == "tiktoken":
        bpe = _through_tiktoken(bpe)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **common)


def _byte_level_bpe(tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340 + len(tokens), special_tokens=tokens, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _through_tiktoken(trained: Tokenizer) -> Tokenizer:
    """The same merges as a file of base64 ranks, read back by transformers' converter."""
    import base64

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
    vocabulary = trained.get_vocab()
    words = [w for w in sorted(vocabulary, key=vocabulary.get) if all(c in to_byte for c in w)]
    words = [word for word in words if not word.startswith("<")]
    ranks = [bytes(to_byte[char] for char in word) for word in words] + [b"<"]
    special = [word for word in sorted(vocabulary, key=vocabulary.get) if word not in words]
    special.remove("<") if "<" in special else None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.model"
        path.write_bytes(b"".join(base64.b64encode(r) + b" %d\n" % i for i, r in enumerate(ranks)))
        converter = TikTokenConverter(str(path), pattern=SPLIT, extra_special_tokens=special)
        return converter.converted()


def _unigram(tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=200 + len(tokens), unk_token=UNK, show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in tokens],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _sentencepiece(tokens: list[str], common: dict) -> PreTrainedTokenizerFast:
    user_defined = [token for token in tokens if token not in (UNK, BOS)]
    with tempfile.TemporaryDirectory() as scratch:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts()), model_prefix=f"{scratch}/tokenizer",
            model_type="bpe", vocab_size=420 + len(tokens), user_defined_symbols=user_defined,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        return LlamaTokenizer.from_pretrained(scratch, **common)
