"""Baselines that hold the student's own answer rows against the teacher's.

    CE(head_s(z_s), gt_s) + losses.kl D

StudentKD is what they share. TokenKD compares distributions token by token: the i-th token of a
turn's answer stands beside the teacher's i-th; what one side has more of is left out. Its D is
given: uld.py for two tokenizers, logit_kd.py for one. Both means are over the student's answer
tokens of the whole step.

Shapes: B conversations, S student length, D student width, M student loss rows, N teacher loss
rows, H teacher width, V student's and W teacher's vocabulary, n rows of a chunk.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from genrecal_ds.data.batch import IGNORE, PairBatch
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.objectives.report import Clock, Report
from genrecal_ds.objectives.supervised import student_ce
from genrecal_ds.recipe.stage_config import LossConfig

Distance = Callable[[Tensor, Tensor], Tensor]  # (logits [n, V], teacher's [n, W]) -> [n]


class StudentKD(nn.Module):
    """Owns the student. The teacher's head is plain tensors, frozen (models/head.py)."""

    trains_student = True

    def __init__(self, student: VLM, losses: LossConfig, clock: Clock | None = None):
        super().__init__()
        self.student, self.losses, self.clock = student, losses, clock or Clock()

    def forward(
        self, batch: PairBatch, teacher_rows: TeacherRows, totals: Totals, probe: bool = False
    ) -> tuple[Tensor, Report]:
        report = Report()
        with self.clock.phase("student"):
            hidden_BSD = self.student.body(*batch.student.inputs)
        loss = self.student_loss(hidden_BSD, batch, totals, report)
        loss = loss + self.teacher_loss(hidden_BSD, batch, teacher_rows, totals, report)
        if probe:
            self.probe(hidden_BSD, batch, teacher_rows, totals, report)
        return loss, report

    def answered(self, batch: PairBatch, teacher_rows: TeacherRows) -> TeacherRows:
        return teacher_rows

    def teacher_loss(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> Tensor:
        """The distance's term, for hidden states of the student."""
        student = batch.student
        with self.clock.phase("head"):
            rows_MD = hidden_BSD.flatten(0, 1).index_select(0, student.rows_M)
            kd_sum, kd_M, is_taught_M = self.kd(rows_MD, batch, teacher_rows)
            report.add_rows("kd", kd_M, student.boundary_M, is_taught_M)
        return self.losses.kl * kd_sum / totals.student_rows

    def student_loss(
        self, hidden_BSD: Tensor, batch: PairBatch, totals: Totals, report: Report
    ) -> Tensor:
        """The student's own term."""
        student = batch.student
        with self.clock.phase("head"):
            ce_sum, ce_M = student_ce(self.student, hidden_BSD, student, self.losses)
            valid_M = student.labels_M != IGNORE
            report.add_rows("student_ce", ce_M, student.boundary_M, valid_M)
        return ce_sum / totals.student_rows

    def probe(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> None:
        """Norm of D's gradient at the student's loss rows, boundary rows apart, and of its CE's.

        Taken at a detached copy of the rows, so no parameter gets a gradient here.
        """
        student = batch.student
        rows_MD = hidden_BSD.detach().flatten(0, 1).index_select(0, student.rows_M)
        with torch.enable_grad():
            leaf_MD = rows_MD.requires_grad_()
            kd_sum, _, _ = self.kd(leaf_MD, batch, teacher_rows)
            (of_kd_MD,) = torch.autograd.grad(kd_sum, leaf_MD)
            ones_M = torch.ones_like(student.labels_M, dtype=torch.float32)
            ce_sum, _ = self.student.head.cross_entropy(leaf_MD, student.labels_M, ones_M)
            (of_ce_MD,) = torch.autograd.grad(ce_sum, leaf_MD)
        for name, gradient_MD, rows_M in (
            ("kd_boundary", of_kd_MD, student.boundary_M),
            ("kd_other", of_kd_MD, ~student.boundary_M),
            ("student_ce", of_ce_MD, torch.ones_like(student.boundary_M)),
        ):
            square = (gradient_MD[rows_M].float() / totals.student_rows).square().sum()
            report.norms[f"gradient/{name}"] = square

    @abstractmethod
    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(D's sum, its parts by row [M], which rows have one [M] bool).

        Gathers the student's head once, whatever the number of rows, or ranks would differ.
        """


class TokenKD(StudentKD):
    def __init__(
        self,
        student: VLM,
        teacher_head: FrozenHead,
        losses: LossConfig,
        distance: Distance,
        clock: Clock | None = None,
    ):
        super().__init__(student, losses, clock)
        self.teacher_head, self.distance = teacher_head, distance

    def kd(
        self, rows_MD: Tensor, batch: PairBatch, teacher_rows: TeacherRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        index_M, is_paired_M = paired_rows(batch)
        targets_MH = teacher_rows.targets_NH.index_select(0, index_M)

        def of_chunk(logits_nV: Tensor, part: slice) -> Tensor:
            teacher_nW = self.teacher_head.logits(targets_MH[part])
            return self.distance(logits_nV, teacher_nW) * is_paired_M[part]

        columns = len(self.teacher_head.head.weight_VH)
        distance = self.student.head.distance(rows_MD, of_chunk, teacher_vocabulary=columns)
        return *distance, is_paired_M


def paired_rows(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(teacher's row [M] at the same place of the same turn, whether there is one [M] bool)."""
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
