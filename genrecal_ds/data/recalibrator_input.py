"""Builds the Recalibrator's input: where every row comes from, and which rows predict.

Everything that depends on lengths is decided here, on the CPU. Later rooms only gather, so no
kernel waits for a number from the device.

Shapes: N teacher loss rows (one pass), P packed rows, C packed sequences, R source rows (B*S of
the student, then A of the teacher), U most uses of one source row.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class TurnRows(NamedTuple):
    """What one turn puts into a packed sequence."""

    question: np.ndarray  # numbers of source rows, as RecalibratorInput.source_P writes them
    answer: np.ndarray
    own_positions: np.ndarray  # of both: each row's place in the sequence its model read


class Turns(NamedTuple):
    """What each turn attends to in the last block, whose output is read at the loss rows alone.

    A turn's loss rows are consecutive, and see their sequence up to the last of them. Sequences
    of several turns repeat their keys, so that each turn is one span of its own.
    """

    keys: Tensor  # int64: packed rows, turn by turn
    cu_queries: Tensor  # int32 [turns + 1], into loss_rows
    cu_keys: Tensor  # int32 [turns + 1], into keys
    max_queries: int
    max_keys: int


class RecalibratorInput(NamedTuple):
    """Where every packed row comes from, and which rows predict.

    A packed sequence is `q1 a1 q2 a2 .. qK aK` of one conversation. The sequences of one pass
    stand together, and every pass has the same loss rows in the same order.
    """

    source_P: Tensor  # int32; i >= 0: student row i of [B*S]; i < 0: teacher row -i-1 of [A]
    uses_RU: Tensor  # int32; its inverse: packed rows that each source row went to, -1 for none
    sequence_P: Tensor  # int64; the packed sequence of each row
    position_ids_P: Tensor  # int64; NPE: 0..n-1 within each sequence
    own_position_ids_P: Tensor  # int64; without NPE: each token's place in its own model's sequence
    loss_rows: Tensor  # int64 [N] for each pass
    cu_seqlens: Tensor  # int32 [C + 1]; sequence c is the packed rows cu_seqlens[c : c + 2]
    turns: Turns
    num_sequences: int
    max_seqlen: int


def lay_out(
    sequences: list[list[TurnRows]], num_student_rows: int, num_teacher_rows: int
) -> RecalibratorInput:
    """Lay out the conversations of all passes, in order; each is a list of turns."""
    source: list[np.ndarray] = []
    sequence, positions, loss_rows, keys, offset = [], [], [], [], 0
    for number, turns in enumerate(sequences):
        length = 0
        for turn in turns:
            source += [turn.question, turn.answer]
            boundary = offset + length + len(turn.question) - 1
            loss_rows.append(np.arange(boundary, boundary + len(turn.answer)))
            keys.append(np.arange(offset, boundary + len(turn.answer)))
            length += len(turn.question) + len(turn.answer)
        sequence.append(np.full(length, number))
        positions.append(np.arange(length))
        offset += length
    source_P = np.concatenate(source)
    own_positions = [turn.own_positions for turns in sequences for turn in turns]
    return RecalibratorInput(
        _tensor(source_P, np.int32),
        _tensor(_uses(source_P, num_student_rows, num_teacher_rows), np.int32),
        _tensor(np.concatenate(sequence)),
        _tensor(np.concatenate(positions)),
        _tensor(np.concatenate(own_positions)),
        _tensor(np.concatenate(loss_rows)),
        _cumulative(sequence),
        Turns(
            _tensor(np.concatenate(keys)),
            _cumulative(loss_rows),
            _cumulative(keys),
            max_queries=max(map(len, loss_rows)),
            max_keys=max(map(len, keys)),
        ),
        num_sequences=len(sequences),
        max_seqlen=max(map(len, sequence)),
    )


def _cumulative(runs: list[np.ndarray]) -> Tensor:
    """int32 [runs + 1]: where each run begins, and the end of the last."""
    return _tensor(np.cumsum([0, *map(len, runs)]), np.int32)


def _uses(source_P: np.ndarray, num_student_rows: int, num_teacher_rows: int) -> np.ndarray:
    """[R, U]: where each source row went, in order; student rows first, -1 where fewer than U."""
    row_P = np.where(source_P >= 0, source_P, num_student_rows - 1 - source_P)
    order_P = np.argsort(row_P, kind="stable")
    sorted_P = row_P[order_P]
    starts_P = np.searchsorted(sorted_P, sorted_P)
    use_P = np.arange(len(row_P)) - starts_P
    uses_RU = np.full((num_student_rows + num_teacher_rows, use_P.max() + 1), -1)
    uses_RU[sorted_P, use_P] = order_P
    return uses_RU


def _tensor(array: np.ndarray, dtype: type = np.int64) -> Tensor:
    return torch.from_numpy(array.astype(dtype))
