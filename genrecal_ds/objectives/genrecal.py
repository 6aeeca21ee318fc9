"""Forms GenRecal's loss: token_align -> Recalibrator -> the teacher's frozen head -> losses.

    align    L_ar + L_kl (mixed)  +  L_ar + L_kl (regular, the regulariser of Algorithm 2)
    distill  L_ar + L_kl (mixed)  +  CE(head_s(z_as), gt_s)

Shapes: B conversations, S student length, D student width, H teacher width, A teacher rows
entering the Recalibrator, N teacher loss rows, K passes (mixed; in align also regular).
"""

from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import TeacherBatch
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.objectives.base import Ingredients, Objective, Seen
from genrecal_ds.objectives.probes import probe_gradients, probe_questions
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

    def teacher_term(self, seen: Seen, report: Report) -> Tensor:
        """L_ar + L_kl of every pass, in one call of the teacher's head."""
        teacher = seen.teacher
        with self.clock.phase("recalibrator"):
            rows = self.recalibrator(seen.hidden_BSD, seen.teacher_rows.inputs_AH, teacher.layout)
            rows_KNH = rows.unflatten(0, (-1, teacher.labels_N.shape[0]))
        with self.clock.phase("head"):
            loss_sum = self._head_terms(rows_KNH, seen, report)
        return loss_sum / seen.totals.teacher_rows

    def labels(self, teacher: TeacherBatch) -> Tensor:
        """Return the teacher's labels [N]; IGNORE on boundary rows if losses.boundary is false."""
        if self.losses.boundary:
            return teacher.labels_N
        return teacher.labels_N.masked_fill(teacher.boundary_N, IGNORE)

    def probe(self, seen: Seen, report: Report) -> None:
        labels_N = self.labels(seen.teacher)
        probe_questions(self.recalibrator, self.teacher_head, labels_N, seen, report)
        if self.trains_student:

            def own_ce(hidden_BSD: Tensor) -> Tensor:
                return self.student_ce(hidden_BSD, seen.batch.student)[0]

            weighted = own_ce if self.losses.student_ce else None
            probe_gradients(self.recalibrator, self.teacher_head, labels_N, weighted, seen, report)

    def _head_terms(self, rows_KNH: Tensor, seen: Seen, report: Report) -> Tensor:
        teacher, targets_NH = seen.teacher, seen.teacher_rows.targets_NH
        losses, labels_N, boundary_N = self.losses, self.labels(teacher), teacher.boundary_N
        # Algorithm 2: losses.regularizer says which terms the regular pass has, at weight 1.
        weights = {
            "mixed": (losses.ar, losses.kl),
            "regular": (float("ce" in losses.regularizer), float("kl" in losses.regularizer)),
        }
        ce_weights, kl_weights = zip(*(weights[name] for name in self.passes), strict=True)
        out = self.teacher_head.loss(rows_KNH, targets_NH, labels_N, ce_weights, kl_weights)
        valid_N, loss_sum = labels_N != IGNORE, out.loss_sum
        for k, name in enumerate(self.passes):
            prefix = "regular_" if name == "regular" else ""
            report.add_rows(f"{prefix}ar", out.ce_KN[k], boundary_N, valid_N)
            report.add_rows(f"{prefix}kl", out.kl_KN[k], boundary_N, valid_N)
            report.add_rows(f"{prefix}agree", out.top1_KN[k], boundary_N, valid_N)
        if "regular" in self.passes and losses.regularizer == "mse":
            difference_NH = rows_KNH[-1] - targets_NH
            error_N = difference_NH.float().square().mean(-1) * valid_N
            report.add_rows("regular_mse", error_N, boundary_N, valid_N)
            loss_sum = loss_sum + error_N.sum()
        return loss_sum
