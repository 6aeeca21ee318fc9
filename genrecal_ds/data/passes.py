"""Builds the Recalibrator's passes: whose rows stand for each question and each answer.

    mixed      q of the student, a of the teacher       the paper's
    aligned    q and a of the student                   ours
    regular    q and a of the teacher                   the regulariser of Algorithm 2

A pass is a list of conversations, each a list of turns, as packed.pack takes them. Student row i of
the padded [B*S] is written i, teacher row j of the A used ones -j - 1.
"""

import numpy as np
import torch
from torch import Tensor

from genrecal_ds.data.byte_matching import Aligner
from genrecal_ds.data.packed import TurnRows
from genrecal_ds.data.pair import EncodedChat, Pair


def mixed(pairs: list[Pair], student_width: int) -> list[list[TurnRows]]:
    """q of the student, a of the teacher: the paper's."""
    views = [pair.teacher for pair in pairs if pair.teacher is not None]
    return [
        [
            TurnRows(
                np.arange(*question) + b * student_width,
                -rows - 1,
                np.concatenate([np.arange(*question), np.arange(*answer)]),
            )
            for question, answer, rows in zip(
                pair.student.questions, view.answers, numbers, strict=True
            )
        ]
        for b, (pair, view, numbers) in enumerate(
            zip(pairs, views, _numbered([view.answers for view in views], 0), strict=True)
        )
    ]


def aligned(
    pairs: list[Pair], student_width: int, aligner: Aligner
) -> tuple[list[list[TurnRows]], Tensor]:
    """q and a of the student, in the places of the teacher's answer tokens: ours.

    And exact_N: a label is this pass's only where the student's row has read what stands before
    it, no less. The first label's row is the question's last.
    """
    sequences, exact = [], []
    for b, pair in enumerate(pairs):
        turns = []
        for question, answer, rows in zip(
            pair.student.questions, pair.student.answers, aligner.rows(pair), strict=True
        ):
            places = np.concatenate([np.arange(*question), answer[0] + rows.student_n])
            split = question[1] - question[0]
            sources = places + b * student_width
            turns.append(TurnRows(sources[:split], sources[split:], places))
            exact += [np.ones(1, bool), rows.is_exact_n[:-1]]
        sequences.append(turns)
    return sequences, torch.from_numpy(np.concatenate(exact))


def regular(views: list[EncodedChat], num_answers: int) -> list[list[TurnRows]]:
    """q and a of the teacher (Algorithm 2); question rows stand behind all answer rows."""
    questions = _numbered([view.questions for view in views], num_answers)
    answers = _numbered([view.answers for view in views], 0)
    return [
        [
            TurnRows(-asked - 1, -answered - 1, np.arange(question[0], answer[1]))
            for question, answer, asked, answered in zip(
                view.questions, view.answers, own_questions, own_answers, strict=True
            )
        ]
        for view, own_questions, own_answers in zip(views, questions, answers, strict=True)
    ]


def _numbered(spans: list[tuple[tuple[int, int], ...]], first: int) -> list[list[np.ndarray]]:
    """Consecutive numbers from `first`, one run per turn of each conversation."""
    numbered, number = [], first
    for turns in spans:
        runs = []
        for start, end in turns:
            runs.append(np.arange(number, number + end - start))
            number += end - start
        numbered.append(runs)
    return numbered
