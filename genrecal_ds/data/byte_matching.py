"""Matches two tokenisations of one text by the bytes that their tokens spell.

At a boundary between two bytes that both token sequences have, both models have read the same text.
The paper needs no such matching. byte_kd does (docs/method.md, "Beyond the paper").

A token's piece is the bytes that the token stands for: none (UNKNOWN) for text that its vocabulary
lacks, None for a special token. The pieces of a turn spell its answer. Some tokenizers add blanks
in front, normalise Unicode or change case. Boundaries inside altered text are left unmatched, and
so is every boundary that is not sure (data/sure_pairs.py). Beside an unknown token, a boundary is
the one behind it.

Shapes: n teacher tokens and m student tokens of one turn's answer, U bytes of the student's answer,
I shared boundaries.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np

from genrecal_ds.data.pair import Pair
from genrecal_ds.data.sure_pairs import Seen, sure_pairs

Piece = bytes | None
Pieces = Sequence[Piece]  # of a vocabulary: token id -> its piece
UNKNOWN = b""  # stands for at least one character
UNMATCHED = -1


class NextBytes(NamedTuple):
    """For each shared boundary of a turn, the token of each side that holds the next byte.

    depth: how many of the token's bytes stand before the boundary. The last entry is the two
    end-of-turn tokens.
    """

    student_I: np.ndarray  # int64, of the m tokens
    student_depth_I: np.ndarray
    teacher_I: np.ndarray  # int64, of the n tokens
    teacher_depth_I: np.ndarray


@dataclass(frozen=True)
class ByteMatcher:
    """Knows both vocabularies' pieces."""

    teacher: Pieces
    student: Pieces

    def next_bytes(self, pair: Pair) -> list[NextBytes]:
        """One per turn."""
        return [match_bytes(*pieces) for pieces in self._turns(pair)]

    def _turns(self, pair: Pair) -> list[tuple[list[Piece], list[Piece]]]:
        assert pair.teacher is not None
        sides = ((pair.teacher, self.teacher), (pair.student, self.student))
        by_side = [
            [
                # The last is the end of turn, whatever it is spelt like.
                [*(pieces[token] for token in chat.input_ids_T[start : end - 1].tolist()), None]
                for start, end in chat.answers
            ]
            for chat, pieces in sides
        ]
        return list(zip(*by_side, strict=True))


def match_bytes(teacher: Pieces, student: Pieces) -> NextBytes:
    """Match one turn's pieces by bytes. The last entry is always the two end-of-turn tokens."""
    ends_n, ends_m = _ends(teacher), _ends(student)
    teacher_of_U = _shared(teacher[:-1], student[:-1])
    at_I = np.flatnonzero(teacher_of_U >= 0)
    student_I, student_depth_I = _token_behind(ends_m, at_I)
    teacher_I, teacher_depth_I = _token_behind(ends_n, teacher_of_U[at_I])
    return NextBytes(
        np.append(student_I, len(ends_m) - 1), np.append(student_depth_I, 0),
        np.append(teacher_I, len(ends_n) - 1), np.append(teacher_depth_I, 0),
    )  # fmt: skip


def _text(pieces: Pieces) -> bytes:
    return b"".join(filter(None, pieces))


def _num_blanks(text: bytes) -> int:
    """Count the blanks in front."""
    return len(text) - len(text.lstrip(b" "))


def _ends(pieces: Pieces) -> np.ndarray:
    """int64 [tokens]: the number of bytes up to the end of each token."""
    return np.fromiter(accumulate(len(piece or b"") for piece in pieces), np.int64, len(pieces))


def _token_behind(ends: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the token that holds the byte behind each boundary, the boundary's place in that token)."""
    token = np.searchsorted(ends, at, side="right")
    starts = np.concatenate([[0], ends])[token]
    return token, at - starts


def _shared(of: Pieces, boundaries: Pieces) -> np.ndarray:
    """int64 [bytes of `boundaries`]: the same boundary in `of`, or UNMATCHED. Increasing."""
    text, own_text = _text(of), _text(boundaries)
    blanks, own_blanks = map(_num_blanks, (text, own_text))
    is_whole = UNKNOWN not in of and UNKNOWN not in boundaries
    if is_whole and text[blanks:] == own_text[own_blanks:]:
        matched = np.arange(len(own_text), dtype=np.int64) - own_blanks + blanks
        if blanks != own_blanks:
            matched[:own_blanks] = UNMATCHED
        return matched
    return _shared_normalised(of, boundaries)


def _shared_normalised(of: Pieces, boundaries: Pieces) -> np.ndarray:
    """Do what _shared does where the bytes differ: compare the texts without their differences."""
    (seen, starts), (own_seen, own_starts) = map(_normalised, (of, boundaries))
    matched = np.full(len(_text(boundaries)), UNMATCHED, np.int64)
    for place, own_place in sure_pairs(seen, own_seen):
        if place in starts and own_place in own_starts:
            matched[own_starts[own_place]] = starts[place]
    return matched


def _normalised(pieces: Pieces) -> tuple[Seen, dict[int, int]]:
    """(the text decomposed and case folded; {place in it where a character starts: boundary}).

    A special token stands for no text, or for its own name where an answer spells that.
    """
    parts: list[str] = []
    starts: dict[int, int] = {}
    gaps: dict[int, int] = {}
    place = boundary = 0
    for is_seen, run in groupby(pieces, bool):
        if not is_seen:
            gaps[place] = sum(piece is not None for piece in run)
            continue
        for character in _text(list(run)).decode("utf-8", "surrogateescape"):
            starts[place] = boundary
            parts.append(_folded(character))
            place += len(parts[-1])
            boundary += len(character.encode("utf-8", "surrogateescape"))
    return Seen("".join(parts), gaps), starts


@lru_cache(maxsize=100_000)
def _folded(character: str) -> str:
    return unicodedata.normalize("NFKD", character).casefold()
