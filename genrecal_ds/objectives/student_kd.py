"""Holds what the baselines share that compare the student's own answer rows with the teacher's.

    CE(head_s(z_s), gt_s) + losses.kl D

StudentKD adds the distance's term to the skeleton. TokenKD compares distributions token by token:
the i-th token of a turn's answer with the teacher's i-th token. Tokens that only one side has are
left out. uld.py gives TokenKD's D for two tokenizers, logit_kd.py for one. Both terms are means
over the student's answer tokens of the whole step.

Shapes: B conversations, S student length, D student width, M student loss rows, N teacher loss
rows, H teacher width, V student's and W teacher's vocabulary, n rows of a chunk.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.objectives.base import Ingredients, Objective, Seen, TeacherRows
from genrecal_ds.objectives.probes import probe_student_rows
from genrecal_ds.objectives.report import Report

Distance = Callable[[Tensor, Tensor], Tensor]  # (logits [n, V], teacher's [n, W]) -> [n]


class StudentKD(Objective):
    def __init__(self, parts: Ingredients):
        super().__init__(parts)
        assert parts.head is not None
        self.teacher_head: FrozenHead = parts.head
        self.matrices = parts.stage.facts.head_matrices

    def teacher_term(self, seen: Seen, report: Report) -> Tensor:
        student = seen.batch.student
        with self.clock.phase("head"):
            rows_MD = seen.hidden_BSD.flatten(0, 1).index_select(0, student.rows_M)
            kd_sum, kd_M, is_taught_M = self.kd(rows_MD, seen.batch, seen.teacher_rows)
            report.add_rows("kd", kd_M, student.boundary_M, is_taught_M)
        return self.losses.kl * kd_sum / seen.totals.student_rows

    def probe(self, seen: Seen, report: Report) -> None:
        student = seen.batch.student
        rows_MD = seen.hidden_BSD.detach().flatten(0, 1).index_select(0, student.rows_M)
        probe_student_rows(
            lambda leaf_MD: self.kd(leaf_MD, seen.batch, seen.teacher_rows)[0],
            self.student.head, rows_MD, student, seen.totals.student_rows, report,
        )  # fmt: skip

    @abstractmethod
    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (sum of D, D by row [M], which rows have a D [M] bool).

        Gathers the student's head once for any number of rows: else ranks' collectives differ.
        """


class TokenKD(StudentKD):
    def __init__(self, parts: Ingredients, distance: Distance):
        super().__init__(parts)
        self.distance = distance

    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        index_M, is_paired_M = paired_rows(batch)
        targets_MH = teacher_rows.targets_NH.index_select(0, index_M)

        def of_chunk(logits_nV: Tensor, part: slice) -> Tensor:
            teacher_nW = self.teacher_head.logits(targets_MH[part])
            return self.distance(logits_nV, teacher_nW) * is_paired_M[part]

        columns = len(self.teacher_head.head.weight_VH)
        distance = self.student.head.distance(
            rows_MD, of_chunk, teacher_vocabulary=columns, matrices=self.matrices
        )
        return *distance, is_paired_M


def paired_rows(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Return (teacher's row [M] at the same place of the same turn, True where one exists [M])."""
    assert batch.teacher is not None
    starts, teacher_starts = (
        boundary.nonzero().flatten()
        for boundary in (batch.student.boundary_M, batch.teacher.boundary_N)
    )
    turn_M = batch.student.boundary_M.cumsum(0) - 1
    num_teacher_rows = len(batch.teacher.labels_N)
    lengths = torch.diff(teacher_starts, append=teacher_starts.new_tensor([num_teacher_rows]))
    place_M = torch.arange(len(turn_M), device=turn_M.device) - starts[turn_M]
    is_there_M = place_M < lengths[turn_M]
    index_M = teacher_starts[turn_M] + place_M.where(is_there_M, 0)
    is_taught_M = (batch.student.labels_M != IGNORE) & (batch.teacher.labels_N[index_M] != IGNORE)
    return index_M, is_there_M & is_taught_M
