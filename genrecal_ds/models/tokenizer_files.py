"""Compares a folder's tokenizer files with the tokenizer that transformers made of them.

transformers picks a tokenizer class by names (model_type, tokenizer_class). Many classes read a
file of another kind without an error: a unigram vocabulary as BPE, a text without its blank in
front, a missing file as an empty vocabulary. The model would then be taught wrongly split text.
"""

import json
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from genrecal_ds.errors import UserError

# Plain text without any special token: classes may treat those in their own way, on purpose.
PROBE = (
    "3 plus 8 is eleven,  it's 2024; na\u00efve caf\u00e9 \u4e2d\u6587 (why?) \uff21\n\nThe end."
)

# What save_pretrained calls a tokenizer that is its tokenizer.json and nothing else.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def is_plain(folder: Path) -> bool:
    """Whether the folder says that tokenizer.json alone defines the tokenizer.

    AutoTokenizer ignores this for some model_types (qwen2) and takes the family's own class.
    """
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    has_file = (folder / "tokenizer.json").is_file()
    return has_file and said.get("tokenizer_class") in _PLAIN and "auto_map" not in said


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer does not do what its file says, or has no offsets."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise UserError(
            f"{folder}: no file of a vocabulary that {_name(tokenizer)} reads; copy tokenizer.json "
            "from the model's release"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: {_name(tokenizer)} gives no character offsets, and answers are found by "
            "them; set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast or "
            "LlamaTokenizer, which do (docs/models.md, Tokenizers)"
        )
    path = folder / "tokenizer.json"
    if path.is_file():
        written = Tokenizer.from_file(str(path))
        written.no_truncation()
        written.no_padding()
        if written.encode(PROBE, add_special_tokens=False).ids != ids:
            raise UserError(
                f"{path}: {_name(tokenizer)} splits text otherwise than this file; to read "
                "the file as it is, set tokenizer_class in tokenizer_config.json to "
                "PreTrainedTokenizerFast"
            )
        return
    for path in sorted(folder.glob("*.model")):
        model = read_sentencepiece(path)
        if model is not None:
            _check_sentencepiece(path, model, tokenizer)


def read_sentencepiece(path: Path) -> Any | None:
    """A sentencepiece file's content; None for a .model file of another kind (tiktoken)."""
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces else None


def _check_sentencepiece(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    fix = "add the release's tokenizer.json, or set tokenizer_class in tokenizer_config.json"
    kind = type(model.trainer_spec).ModelType.Name(model.trainer_spec.model_type)
    read = type(tokenizer.backend_tokenizer.model).__name__
    if kind in ("UNIGRAM", "BPE") and read.upper() in ("UNIGRAM", "BPE") and kind != read.upper():
        raise UserError(f"{path}: a {kind} model, and {_name(tokenizer)} reads it as {read}; {fix}")
    pieces = SentencePieceProcessor(model_file=str(path)).encode(PROBE, out_type=str)
    tokens = tokenizer.tokenize(PROBE)
    if tokens != pieces:
        one, other = next(
            pair
            for pair in zip([*tokens, None], [*pieces, None], strict=False)
            if pair[0] != pair[1]
        )
        raise UserError(
            f"{path}: {_name(tokenizer)} splits text otherwise than this file ({one!a} for "
            f"{other!a}); {fix}"
        )


def check_embedding(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError for a token without an embedding row. Rows without a token are padding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has token ids up to {largest}, config.json's vocab_size is "
            f"{vocab_size}; take both from the same release, or resize the embedding"
        )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return type(tokenizer).__name__
