"""The characters of every token of a slow tokenizer, exact or refused.

A slow tokenizer gives ids and no offsets. It is asked for its pieces again, part by part as it
cuts a text at its own added tokens, and the pieces are laid along the text: sentencepiece says
itself which characters a piece stands for, any other tokenizer's pieces must spell the text byte
for byte in one of a few ways. A piece of a part of a character (a byte) has the whole character.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_python import PythonBackend

from genrecal_ds.data.pair import Unusable

Span = tuple[int, int]  # half-open, in characters
Piece = str | bytes
Spelling = Callable[[Piece], bytes | None]

SPACE = "\u2581"  # sentencepiece's
_GPT2_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


class SlowOffsets:
    """Spans for one slow tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self.whole = {*self.added, *tokenizer.all_special_tokens}
        # One that tokenises in its own way also finds its special tokens in its own way.
        self.is_cut = type(tokenizer).tokenize is PythonBackend.tokenize

    def spans(self, text: str, ids: list[int]) -> list[Span]:
        """A span per token of ids, which tokenizer(text) gave. Raises Unusable: none is sure."""
        pieces: list[Piece] = []
        spans: list[Span] = []
        for start, part in self._parts(text):
            words = self._pieces(part)
            pieces += words
            spans += [(start + begin, start + end) for begin, end in self._lay(part, words)]
        if self.tokenizer.convert_tokens_to_ids(pieces) != ids:
            raise Unusable("a text that its slow tokenizer splits in a way of its own")
        return spans

    def _parts(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, part) as PythonBackend.tokenize cuts: added tokens, and the text in between.

        Blanks that an added token swallows (rstrip, lstrip) lie in no part. single_word is left
        out: where it matters the ids differ, and the text is refused.
        """
        if not self.is_cut:
            yield 0, text
            return
        if self.tokenizer.prepare_for_tokenization(text)[0] != text:
            raise Unusable("a text that its slow tokenizer alters first")
        parts = self.tokenizer.tokens_trie.split(text)
        starts = [0, *accumulate(map(len, parts))]
        added = [self.added.get(part) for part in parts]
        for position, (part, start) in enumerate(zip(parts, starts, strict=False)):
            before = added[position - 1] if position else None
            after = added[position + 1] if position + 1 < len(parts) else None
            if before is not None and before.rstrip:
                start, part = start + len(part) - len(part.lstrip()), part.lstrip()
            if after is not None and after.lstrip:
                part = part.rstrip()
            if part:
                yield start, part

    def _pieces(self, part: str) -> list[Piece]:
        if not self.is_cut:
            return self.tokenizer.tokenize(part)
        return [part] if part in self.whole else self.tokenizer._tokenize(part)

    def _lay(self, part: str, pieces: list[Piece]) -> list[Span]:
        if pieces == [part]:
            return [(0, len(part))]
        model = getattr(self.tokenizer, "sp_model", None)
        if model is not None:
            # Some encode behind <unk>, so that sentencepiece adds no blank, and drop it again.
            for prefix in ("", str(self.tokenizer.unk_token)):
                found = _by_surface(model.encode_as_proto(prefix + part).pieces, part, pieces)
                if found is not None:
                    return found
        return self._by_spelling(part, pieces)

    def _by_spelling(self, part: str, pieces: list[Piece]) -> list[Span]:
        found = []
        for spelling, may_add_blank in SPELLINGS:
            words = [
                piece.encode() if piece in self.whole and isinstance(piece, str)
                else spelling(piece)
                for piece in pieces
            ]  # fmt: skip
            if any(word is None for word in words):
                continue
            for added in (0, 1) if may_add_blank else (0,):
                if b"".join(words) == b" " * added + part.encode():
                    found.append(_characters(part, [len(word) for word in words], added))
        if not found or any(spans != found[0] for spans in found):
            raise Unusable("a text that its slow tokenizer's pieces do not spell")
        return found[0]


def _by_surface(encoded: Any, part: str, pieces: list[Piece]) -> list[Span] | None:
    """Spans from sentencepiece's own account of the last pieces; None if it tells of others."""
    encoded = list(encoded)[-len(pieces) :] if pieces else []
    surfaces = [piece.surface for piece in encoded]
    said = "".join(surfaces)
    skipped = part.find(said)
    if [piece.piece for piece in encoded] != pieces or skipped < 0:
        return None
    if (part[:skipped] + part[skipped + len(said) :]).strip():
        return None  # only blanks at the ends may be left out: some models drop those
    if surfaces and (not surfaces[-1] or (len(said) < len(part) and not said.strip())):
        return None
    spans: list[Span] = []
    for start, end in reversed(list(pairwise(accumulate(map(len, surfaces), initial=skipped)))):
        # Nothing on the surface: all but the last byte of a character, or a blank that is added
        # in front. It goes with the character behind it.
        spans.append(spans[-1] if start == end else (start, end))
    return spans[::-1]


def _characters(text: str, sizes: list[int], added: int) -> list[Span]:
    """Sizes in bytes, one per piece -> spans in characters; `added` bytes in front are no text."""
    character = [number for number, char in enumerate(text) for _ in char.encode()]
    character = [0] * added + character
    spans = []
    for start, end in pairwise(accumulate(sizes, initial=0)):
        if start == end:
            raise Unusable("a text that its slow tokenizer's pieces do not spell")
        spans.append((character[start], character[end - 1] + 1))
    return spans


def _as_is(piece: Piece) -> bytes | None:
    return piece if isinstance(piece, bytes) else piece.encode()


def _as_bytes(piece: Piece) -> bytes | None:
    """One character is one byte."""
    if isinstance(piece, bytes):
        return piece
    return piece.encode("latin-1") if all(ord(char) < 256 for char in piece) else None


def _as_gpt2(piece: Piece) -> bytes | None:
    """Bytes as printable characters."""
    if isinstance(piece, bytes) or not all(char in _GPT2_BYTES for char in piece):
        return None
    return bytes(_GPT2_BYTES[char] for char in piece)


def as_sentencepiece(piece: Piece) -> bytes | None:
    """A mark for a blank, and <0xE4> for a byte."""
    if isinstance(piece, bytes):
        return None
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


# Ways of writing bytes as pieces, and whether a blank may be added in front of a part.
SPELLINGS: tuple[tuple[Spelling, bool], ...] = (
    (_as_is, False),
    (_as_bytes, False),
    (_as_gpt2, False),
    (as_sentencepiece, True),
)
