"""GenRecal: two bodies -> token_align -> Recalibrator -> the teacher's frozen head -> losses.

    align    L_ar + L_kl (mixed)  +  L_ar + L_kl (regular, the regulariser of Algorithm 2)
    distill  L_ar + L_kl (mixed)  +  CE(head_s(z_as), gt_s)

Shapes: B conversations, S student length, D student width, H teacher width, A teacher rows
entering the Recalibrator, N teacher loss rows, K passes (mixed; in align also regular).
"""

from torch import Tensor

from genrecal_ds.data.batch import IGNORE, PairBatch, TeacherBatch
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.objectives.base import Ingredients, Objective, TeacherRows, Totals
from genrecal_ds.objectives.probes import Recalibration, probe_gradients, probe_questions
from genrecal_ds.objectives.report import Report


def build(parts: Ingredients) -> "GenRecal":
    return GenRecal(parts)


class GenRecal(Objective):
    def __init__(self, parts: Ingredients):
        super().__init__(parts)
        assert parts.recalibrator is not None and parts.head is not None
        self.recalibrator: Recalibrator = parts.recalibrator
        self.teacher_head: FrozenHead = parts.head
        # data/batch.py lays the passes out in this order.
        self.passes = ("mixed", "regular") if parts.stage.has_regular else ("mixed",)

    def teacher_term(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> Tensor:
        """Return L_ar + L_kl of every pass, by one call of the teacher's head."""
        teacher = batch.teacher
        assert teacher is not None
        with self.clock.phase("recalibrator"):
            rows_KNH = self.recalibrate(hidden_BSD, teacher, teacher_rows)
        with self.clock.phase("head"):
            loss_sum = self._head_terms(rows_KNH, teacher, teacher_rows, report)
        return loss_sum / totals.teacher_rows

    def recalibrate(
        self, hidden_BSD: Tensor, teacher: TeacherBatch, teacher_rows: TeacherRows
    ) -> Tensor:
        """Return the Recalibrator's loss rows of every pass, [K, N, H]."""
        rows = self.recalibrator(hidden_BSD, teacher_rows.inputs_AH, teacher.layout)
        return rows.unflatten(0, (-1, teacher.labels_N.shape[0]))

    def labels(self, teacher: TeacherBatch) -> Tensor:
        """Return the teacher's labels [N]; IGNORE on boundary rows if losses.boundary is false."""
        if self.losses.boundary:
            return teacher.labels_N
        return teacher.labels_N.masked_fill(teacher.boundary_N, IGNORE)

    def probe(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> None:
        teacher, student = batch.teacher, batch.student
        assert teacher is not None
        labels_N = self.labels(teacher)
        of = Recalibration(self.recalibrator, self.teacher_head, teacher, teacher_rows, labels_N)
        probe_questions(of, hidden_BSD, report)
        if self.trains_student:

            def own_ce(hidden_BSD: Tensor) -> Tensor:
                return self.student_ce(hidden_BSD, student)[0]

            weighted = own_ce if self.losses.student_ce else None
            probe_gradients(of, weighted, hidden_BSD, totals, report)

    def _head_terms(
        self,
        rows_KNH: Tensor,
        teacher: TeacherBatch,
        teacher_rows: TeacherRows,
        report: Report,
    ) -> Tensor:
        losses, labels_N, boundary_N = self.losses, self.labels(teacher), teacher.boundary_N
        # Algorithm 2: losses.regularizer says which terms the regular pass has, at weight 1.
        weights = {
            "mixed": (losses.ar, losses.kl),
            "regular": (float("ce" in losses.regularizer), float("kl" in losses.regularizer)),
        }
        ce_weights, kl_weights = zip(*(weights[name] for name in self.passes), strict=True)
        out = self.teacher_head.loss(
            rows_KNH, teacher_rows.targets_NH, labels_N, ce_weights, kl_weights
        )
        valid_N, loss_sum = labels_N != IGNORE, out.loss_sum
        for k, name in enumerate(self.passes):
            prefix = "regular_" if name == "regular" else ""
            report.add_rows(f"{prefix}ar", out.ce_KN[k], boundary_N, valid_N)
            report.add_rows(f"{prefix}kl", out.kl_KN[k], boundary_N, valid_N)
            report.add_rows(f"{prefix}agree", out.top1_KN[k], boundary_N, valid_N)
        if "regular" in self.passes and losses.regularizer == "mse":
            difference_NH = rows_KNH[-1] - teacher_rows.targets_NH
            error_N = difference_NH.float().square().mean(-1) * valid_N
            report.add_rows("regular_mse", error_N, boundary_N, valid_N)
            loss_sum = loss_sum + error_N.sum()
        return loss_sum
