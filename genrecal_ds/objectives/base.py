"""Gives every objective its skeleton: runs the student's body once, then adds the terms.

    loss = teacher_term + student_term        student_term = CE(head_s(z_s), gt_s)

An objective adds its teacher's term and nothing else. The trainer knows only this file. Both terms
are divided by row counts of the whole optimizer step. The loss therefore depends neither on the
number of ranks nor on the micro-batch.

Shapes: B conversations, S student length, D student width, H teacher width, A teacher rows
entering the Recalibrator, N teacher loss rows, M student loss rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import PairBatch, StudentBatch, TeacherBatch
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives.report import Clock, Report
from genrecal_ds.recipe.stage_config import StageConfig


class Totals(NamedTuple):
    """Loss rows of the WHOLE optimizer step, over all ranks and micro-batches; at least 1."""

    teacher_rows: float
    student_rows: float


class TeacherRows(NamedTuple):
    """The teacher's hidden states that a micro-batch needs, frozen."""

    inputs_AH: Tensor  # rows that enter the Recalibrator
    targets_NH: Tensor  # z: the teacher's own rows that predict the labels


class Seen(NamedTuple):
    """A micro-batch after both bodies have read it."""

    hidden_BSD: Tensor  # the student's
    batch: PairBatch
    teacher: TeacherBatch
    teacher_rows: TeacherRows
    totals: Totals


@dataclass(frozen=True)
class Ingredients:
    """What an objective may be built from; a part that the stage's kind does not use is None."""

    stage: StageConfig
    student: VLM
    encoders: PairEncoders
    clock: Clock
    head: FrozenHead | None = None  # the teacher's
    recalibrator: Recalibrator | None = None
    matcher: ByteMatcher | None = None


class Objective(nn.Module):
    """Owns what trains. The teacher's head is plain tensors (models/head.py), so no optimizer and
    no checkpoint holds that head."""

    def __init__(self, parts: Ingredients):
        super().__init__()
        self.student, self.losses, self.clock = parts.student, parts.stage.losses, parts.clock
        self.trains_student = parts.stage.facts.trains_student

    def forward(
        self,
        batch: PairBatch,
        teacher_rows: TeacherRows | None,
        totals: Totals,
        probe: bool = False,
    ) -> tuple[Tensor, Report]:
        """Return (loss, Report). probe: also measure what each class of rows learns, from where."""
        report, terms = Report(), []
        with self.clock.phase("student"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_student):
                hidden_BSD = self.student.body(*batch.student.inputs)
        seen = None
        if teacher_rows is not None:
            assert batch.teacher is not None
            seen = Seen(hidden_BSD, batch, batch.teacher, teacher_rows, totals)
            terms.append(self.teacher_term(seen, report))
        if self.trains_student:
            terms.append(self.student_term(hidden_BSD, batch.student, totals, report))
        if probe and seen:
            self.probe(seen, report)
        return sum(terms[1:], terms[0]), report

    def teacher_term(self, seen: Seen, report: Report) -> Tensor:
        """What the teacher says of the student's hidden states; adds its rows to the report."""
        raise NotImplementedError

    def probe(self, seen: Seen, report: Report) -> None:
        """Adds measurements to the report; changes no gradient (objectives/probes.py)."""

    def student_term(
        self, hidden_BSD: Tensor, student: StudentBatch, totals: Totals, report: Report
    ) -> Tensor:
        """Return CE(head_s(z_s), gt_s) of a student that trains."""
        with self.clock.phase("head"):
            ce_sum, ce_M = self.student_ce(hidden_BSD, student)
            valid_M = student.labels_M != IGNORE
            report.add_rows("student_ce", ce_M, student.boundary_M, valid_M)
        # ZeRO-3 adds to a STALE gradient when a parameter first gets one late in a window. The
        # last summand keeps the whole body in every micro-step's graph, whatever the terms are.
        return ce_sum / totals.student_rows + 0.0 * hidden_BSD.sum()

    def student_ce(self, hidden_BSD: Tensor, student: StudentBatch) -> tuple[Tensor, Tensor]:
        """Return (weighted CE sum, CE per row [M] detached) of the student's own answer tokens.

        With a weight of 0 the CE is only measured: one product of the head, no gradient.
        """
        rows_MD = hidden_BSD.flatten(0, 1).index_select(0, student.rows_M)
        losses = self.losses
        weights_M = losses.student_ce * (1.0 + losses.first_token_ce * student.boundary_M.float())
        with torch.set_grad_enabled(torch.is_grad_enabled() and losses.student_ce > 0):
            return self.student.head.cross_entropy(rows_MD, student.labels_M, weights_M)
