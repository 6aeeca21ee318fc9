"""Matches two tokenisations of one text by the bytes that their tokens spell.

At a boundary between two bytes that both token sequences have, both models have read the same text.
The paper needs no such matching. byte_kd does (docs/method.md, "Beyond the paper").

A token's piece is the bytes that the token stands for, or None for a special token. The pieces of a
turn spell its answer. Some tokenizers add blanks in front, normalise Unicode or change case.
Boundaries inside altered text are left unmatched, and so is every boundary that is not sure.

Shapes: n teacher tokens and m student tokens of one turn's answer, U bytes of the student's answer,
I shared boundaries.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from genrecal_ds.data.pair import Pair

Piece = bytes | None
Pieces = Sequence[Piece]  # of a vocabulary: token id -> its piece
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
    teacher_of_U = _shared(_text(teacher), _text(student))[:-1]
    at_I = np.flatnonzero(teacher_of_U >= 0)
    at_I = at_I[teacher_of_U[at_I] < ends_n[-1]]
    student_I, student_depth_I = _token_behind(ends_m, at_I)
    teacher_I, teacher_depth_I = _token_behind(ends_n, teacher_of_U[at_I])
    return NextBytes(
        np.append(student_I, len(ends_m) - 1), np.append(student_depth_I, 0),
        np.append(teacher_I, len(ends_n) - 1), np.append(teacher_depth_I, 0),
    )  # fmt: skip


def _text(pieces: Pieces) -> bytes:
    return b"".join(piece for piece in pieces if piece)


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


def _shared(of: bytes, boundaries: bytes) -> np.ndarray:
    """int64 [len(boundaries) + 1]: the same boundary in `of`, or UNMATCHED. Increasing."""
    blanks, own_blanks = map(_num_blanks, (of, boundaries))
    if of[blanks:] == boundaries[own_blanks:]:
        matched = np.arange(len(boundaries) + 1, dtype=np.int64) - own_blanks + blanks
        if blanks != own_blanks:
            matched[:own_blanks] = UNMATCHED
        return matched
    return _shared_normalised(of, boundaries)


def _shared_normalised(of: bytes, boundaries: bytes) -> np.ndarray:
    """Do what _shared does where the bytes differ: compare the texts without their differences."""
    texts, places = zip(*(_normalised(text) for text in (of, boundaries)), strict=True)
    length, own_length = map(len, texts)
    prefix = suffix = 0
    if texts[0] == texts[1]:
        prefix = own_length
    else:  # a token for text that its vocabulary lacks, most likely: up to there, and from there
        shorter = min(length, own_length)
        while prefix < shorter and texts[0][prefix] == texts[1][prefix]:
            prefix += 1
        while suffix < shorter - prefix and texts[0][-1 - suffix] == texts[1][-1 - suffix]:
            suffix += 1
    pairs = set()
    by_place = {place: boundary for boundary, place in enumerate(places[0]) if place >= 0}
    for boundary, place in enumerate(places[1]):
        if 0 <= place <= prefix and place in by_place:
            pairs.add((boundary, by_place[place]))
        moved = place - own_length + length
        if suffix and place >= own_length - suffix and moved in by_place:
            pairs.add((boundary, by_place[moved]))
    # Where one side has no bytes for a text, one boundary of it is before and behind that text.
    times, own_times = (Counter(side) for side in ([p[1] for p in pairs], [p[0] for p in pairs]))
    matched = np.full(len(boundaries) + 1, UNMATCHED, np.int64)
    for boundary, other in pairs:
        if times[other] == own_times[boundary] == 1:
            matched[boundary] = other
    return matched


def _normalised(text: bytes) -> tuple[str, list[int]]:
    """(the text decomposed, case folded, without blanks in front; each boundary's place in it).

    UNMATCHED for boundaries inside a character and inside the blanks.
    """
    characters = text.decode("utf-8", "surrogateescape")
    blanks = _num_blanks(text)
    parts: list[str] = []
    places, place = [UNMATCHED] * blanks + [0], 0
    for character in characters[blanks:]:
        size = len(character.encode("utf-8", "surrogateescape"))
        parts.append(_folded(character))
        place += len(parts[-1])
        places += [UNMATCHED] * (size - 1) + [place]
    return "".join(parts), places


@lru_cache(maxsize=100_000)
def _folded(character: str) -> str:
    return unicodedata.normalize("NFKD", character).casefold()
