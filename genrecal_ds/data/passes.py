"""Builds the Recalibrator's passes: whose rows stand for each question and each answer.

    mixed      q of the student, a of the teacher
    regular    q and a of the teacher                   the regulariser of Algorithm 2

A pass is a list of conversations, each a list of turns; recalibrator_input.lay_out takes them.
Student row i of the padded [B*S] is written i, teacher row j of the A used ones -j - 1.
"""

import numpy as np

from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.data.recalibrator_input import TurnRows


def mixed(pairs: list[Pair], student_width: int) -> list[list[TurnRows]]:
    """q of the student, a of the teacher."""
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
