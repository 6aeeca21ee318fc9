"""Finds the bytes that each token of a vocabulary stands for, or refuses the vocabulary."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from genrecal_ds.data.byte_matching import UNKNOWN
from genrecal_ds.errors import UserError
from genrecal_ds.ops.next_byte import END, STOP, ByteVocabulary

Spelling = Callable[[str], bytes | None]

SPACE = "\u2581"  # sentencepiece's
_GPT2_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
MOST_BYTES = 32  # of a token; boundaries further inside one are left out

# Plain text that every tokenizer writes as it is, but for a blank in front: normalised, lower case.
PROBES = (
    "3 plus 8 is eleven", "a  b, it's 2024\n", "na\u00efve caf\u00e9", "\u4e2d\u6587 \U0001f600"
)  # fmt: skip


def _as_gpt2(piece: str) -> bytes | None:
    """Read bytes written as printable characters."""
    if not all(char in _GPT2_BYTES for char in piece):
        return None
    return bytes(_GPT2_BYTES[char] for char in piece)


def _as_sentencepiece(piece: str) -> bytes:
    """Read a mark as a blank, and <0xE4> as a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


# The ways in which tokenizers write bytes as pieces.
SPELLINGS: tuple[Spelling, ...] = (str.encode, _as_gpt2, _as_sentencepiece)


def token_bytes(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[bytes | None]:
    """Each token id's bytes: UNKNOWN for the unknown token, None for other special tokens and for
    ids without a token.

    Raises UserError where no way of spelling gives a text back.
    """
    spell = _spelling(tokenizer, folder)
    added = tokenizer.added_tokens_decoder
    size = max([*tokenizer.get_vocab().values(), *added]) + 1
    bytes_of: list[bytes | None] = [None] * size
    special = set(tokenizer.all_special_ids)
    for piece, token in tokenizer.get_vocab().items():
        if token in added:
            is_text = not added[token].special and token not in special
            # Runs of blanks among sentencepiece's added tokens are written with its mark, too.
            written = spell if spell is _as_sentencepiece else str.encode
            bytes_of[token] = written(str(added[token])) if is_text else None
        elif token not in special:
            bytes_of[token] = spell(piece)
    if tokenizer.unk_token_id is not None:
        bytes_of[tokenizer.unk_token_id] = UNKNOWN
    return bytes_of


def _spelling(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Spelling:
    """Find the way in which pieces spell every probe that the vocabulary has the characters for."""
    for spelling in SPELLINGS:
        said = [_spells(tokenizer, spelling, probe) for probe in PROBES]
        if True in said and False not in said:
            return spelling
    raise UserError(
        f"{folder}: cannot tell the bytes of its tokens ({type(tokenizer).__name__}); a stage that "
        "aligns two tokenizers by bytes needs one of byte-level, tiktoken or sentencepiece kind"
    )


def _spells(tokenizer: PreTrainedTokenizerBase, spelling: Spelling, text: str) -> bool | None:
    """Whether pieces spell the text, but for a blank in front; None for unknown characters."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return None
    pieces: list[str] = tokenizer.convert_ids_to_tokens(ids)
    words = [spelling(piece) for piece in pieces]
    if any(word is None for word in words):
        return False
    spelt = b"".join(word for word in words if word is not None)
    return spelt in (text.encode(), b" " + text.encode())


def byte_vocabulary(
    pieces: Sequence[bytes | None], end_of_turn: int, num_logits: int, device: torch.device
) -> ByteVocabulary:
    """Make the tables of ops/next_byte. num_logits: columns of the head, padding included."""
    shown = enumerate(pieces[:num_logits])  # of some families the head lacks the last tokens
    tokens = [token for token, piece in shown if piece and token != end_of_turn]
    tokens.sort(key=lambda token: pieces[token] or b"")
    words = [pieces[token] or b"" for token in tokens]
    depth = min(MOST_BYTES, max(map(len, words)))
    symbols = np.full((len(words), depth + 1), STOP, np.int64)
    for place, word in enumerate(words):
        cut = word[: depth + 1]
        symbols[place, : len(cut)] = np.frombuffer(cut, np.uint8)
    low = np.zeros_like(symbols)
    high = np.full_like(symbols, len(words))
    places = np.arange(len(words))
    differs = np.zeros(len(words), bool)  # from the word before, in the first d bytes
    differs[:1] = True
    for d in range(1, depth + 1):
        differs[1:] |= symbols[1:, d - 1] != symbols[:-1, d - 1]
        low[:, d] = np.maximum.accumulate(np.where(differs, places, 0))
        starts = np.append(np.flatnonzero(differs), len(words))
        high[:, d] = starts[np.searchsorted(starts, places, side="right")]
    first = np.full(num_logits, STOP, np.int64)
    first[tokens], first[end_of_turn] = symbols[:, 0], END
    place_of = np.full(num_logits, -1, np.int64)
    place_of[tokens] = places
    narrow = symbols.astype(np.int16), low.astype(np.int32), high.astype(np.int32)
    tables = (first, np.array(tokens), place_of, *narrow)
    return ByteVocabulary(*(torch.from_numpy(table).to(device) for table in tables))
