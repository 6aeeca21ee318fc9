"""CE(head_s(z_as), gt_s): stages pretrain and sft, and the controls without a teacher.

Shapes: B conversations, S student length, D student width, M student loss rows.
"""

import torch
from torch import Tensor, nn

from genrecal_ds.data.batch import IGNORE, PairBatch, StudentBatch
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.objectives.report import Clock, Report
from genrecal_ds.recipe.stage_config import LossConfig


def student_ce(
    student: VLM, hidden_BSD: Tensor, batch: StudentBatch, losses: LossConfig
) -> tuple[Tensor, Tensor]:
    """(weighted CE sum, CE per row [M] detached) of the student's own answer tokens.

    With a weight of 0 it is only measured: one product of the head, no gradient.
    """
    rows_MD = hidden_BSD.flatten(0, 1).index_select(0, batch.rows_M)
    weights_M = losses.student_ce * (1.0 + losses.first_token_ce * batch.boundary_M.float())
    with torch.set_grad_enabled(torch.is_grad_enabled() and losses.student_ce > 0):
        return student.head.cross_entropy(rows_MD, batch.labels_M, weights_M)


class Supervised(nn.Module):
    def __init__(self, student: VLM, losses: LossConfig, clock: Clock | None = None):
        super().__init__()
        self.student, self.losses = student, losses
        self.clock = clock or Clock()

    def forward(
        self,
        batch: PairBatch,
        teacher_rows: TeacherRows | None,
        totals: Totals,
        probe: bool = False,
    ) -> tuple[Tensor, Report]:
        report = Report()
        with self.clock.phase("student"):
            hidden_BSD = self.student.body(*batch.student.inputs)
        with self.clock.phase("head"):
            ce_sum, ce_M = student_ce(self.student, hidden_BSD, batch.student, self.losses)
            valid_M = batch.student.labels_M != IGNORE
            report.add_rows("student_ce", ce_M, batch.student.boundary_M, valid_M)
        return ce_sum / totals.student_rows, report
