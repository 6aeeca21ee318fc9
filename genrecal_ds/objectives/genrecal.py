"""GenRecal: two bodies -> token_align -> Recalibrator -> the teacher's frozen head -> losses.

    align    L_ar + L_kl (mixed)  +  L_ar + L_kl (regular, the regulariser of Algorithm 2)
    distill  L_ar + L_kl (mixed)  +  CE(head_s(z_as), gt_s)

Shapes: B conversations, S student length, D student width, H teacher width, A teacher rows
entering the Recalibrator, N teacher loss rows, K passes (mixed; in align also regular),
M student loss rows.
"""

import torch
from torch import Tensor, nn

from genrecal_ds.config import LossConfig
from genrecal_ds.data.batch import IGNORE, PairBatch, TeacherBatch
from genrecal_ds.metrics import Clock, Report
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.objectives.supervised import student_ce


class GenRecal(nn.Module):
    """Owns what trains: the student and the Recalibrator. The teacher's head is plain tensors,
    frozen: no optimizer and no checkpoint ever sees it (models/head.py)."""

    def __init__(
        self,
        student: VLM,
        recalibrator: Recalibrator,
        teacher_head: FrozenHead,
        losses: LossConfig,
        trains_student: bool,
        clock: Clock | None = None,
    ):
        super().__init__()
        self.student, self.recalibrator = student, recalibrator
        self.teacher_head, self.losses, self.trains_student = teacher_head, losses, trains_student
        self.with_regular = not trains_student and losses.regularizer != "none"
        self.clock = clock or Clock()

    def forward(
        self, batch: PairBatch, teacher_rows: TeacherRows, totals: Totals, probe: bool = False
    ) -> tuple[Tensor, Report]:
        """(loss, Report). probe adds the student's gradient norm per term to the report."""
        assert batch.teacher is not None
        report = Report()
        with self.clock.phase("student"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_student):
                hidden_BSD = self.student.body(*batch.student.inputs)
        with self.clock.phase("recalibrator"):
            rows_KNH = self._recalibrate(hidden_BSD, batch.teacher, teacher_rows)
        with self.clock.phase("head"):
            loss = self._teacher_terms(rows_KNH, batch.teacher, teacher_rows, totals, report)
            if self.trains_student and self.losses.student_ce:
                loss = loss + self._student_term(hidden_BSD, batch, totals, report)
        if self.trains_student:
            # ZeRO-3 adds to a STALE gradient when a parameter first gets one late in a window;
            # this keeps the whole body in every micro-step's graph, whatever the terms are.
            loss = loss + 0.0 * hidden_BSD.sum()
        if probe:
            self._probe_questions(hidden_BSD, batch.teacher, teacher_rows, report)
        if probe and self.trains_student:
            self._probe_gradients(hidden_BSD, batch, teacher_rows, totals, report)
        return loss, report

    def _recalibrate(
        self, hidden_BSD: Tensor, teacher: TeacherBatch, teacher_rows: TeacherRows
    ) -> Tensor:
        rows = self.recalibrator(hidden_BSD, teacher_rows.inputs_AH, teacher.packing)
        return rows.unflatten(0, (-1, teacher.labels_N.shape[0]))

    def _teacher_terms(
        self,
        rows_KNH: Tensor,
        teacher: TeacherBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> Tensor:
        """L_ar + L_kl of every pass through the frozen head, from one head_loss call."""
        losses, labels_N = self.losses, teacher.labels_N
        if not losses.boundary:
            labels_N = labels_N.masked_fill(teacher.boundary_N, IGNORE)
        valid_N = labels_N != IGNORE
        ce_weights, kl_weights = [losses.ar], [losses.kl]
        if self.with_regular:
            ce_weights.append(float("ce" in losses.regularizer))
            kl_weights.append(float("kl" in losses.regularizer))
        out = self.teacher_head.loss(
            rows_KNH, teacher_rows.targets_NH, labels_N, ce_weights, kl_weights
        )
        for k, prefix in enumerate(("", "regular_")[: len(rows_KNH)]):
            report.add_rows(f"{prefix}ar", out.ce_KN[k], teacher.boundary_N, valid_N)
            report.add_rows(f"{prefix}kl", out.kl_KN[k], teacher.boundary_N, valid_N)
            report.add_rows(f"{prefix}agree", out.top1_KN[k], teacher.boundary_N, valid_N)
        loss_sum = out.loss_sum
        if self.with_regular and losses.regularizer == "mse":
            error_N = (rows_KNH[1] - teacher_rows.targets_NH).float().square().mean(-1) * valid_N
            report.add_rows("regular_mse", error_N, teacher.boundary_N, valid_N)
            loss_sum = loss_sum + error_N.sum()
        return loss_sum / totals.teacher_rows

    def _student_term(
        self, hidden_BSD: Tensor, batch: PairBatch, totals: Totals, report: Report
    ) -> Tensor:
        ce_sum, ce_M = student_ce(self.student, hidden_BSD, batch.student, self.losses)
        valid_M = batch.student.labels_M != IGNORE
        report.add_rows("student_ce", ce_M, batch.student.boundary_M, valid_M)
        return ce_sum / totals.student_rows

    @torch.no_grad()
    def _probe_questions(
        self, hidden_BSD: Tensor, teacher: TeacherBatch, teacher_rows: TeacherRows, report: Report
    ) -> None:
        """L_ar and L_kl of the mixed pass with another sample's question states, and with none."""
        labels_N, packing = teacher.labels_N, teacher.packing
        exchanged = packing._replace(source_P=exchanged_questions(teacher, hidden_BSD.shape[1]))
        is_alone = len(hidden_BSD) == 1  # no other sample to exchange with
        for name, hidden, of in (
            ("shuffled", hidden_BSD, exchanged),
            ("zeroed", torch.zeros_like(hidden_BSD), packing),
        ):
            rows_NH = self.recalibrator(hidden, teacher_rows.inputs_AH, of)[: len(labels_N)]
            out = self.teacher_head.loss(
                rows_NH[None], teacher_rows.targets_NH, labels_N, [1.0], [1.0]
            )
            valid_N = (labels_N != IGNORE) & (not (is_alone and name == "shuffled"))
            for term, values_N in (("ar", out.ce_KN[0]), ("kl", out.kl_KN[0])):
                report.add_rows(f"probe/{term}_{name}", values_N, teacher.boundary_N, valid_N)

    def _probe_gradients(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> None:
        """Norm of each term's gradient at the student's hidden states, boundary rows apart.

        Taken at a detached copy of the hidden states, so no parameter gets a gradient here.
        """
        teacher = batch.teacher
        assert teacher is not None
        with torch.enable_grad():
            leaf_BSD = hidden_BSD.detach().requires_grad_()
            rows_KNH = self._recalibrate(leaf_BSD, teacher, teacher_rows)[:1]
            for name, weights in (("ar", ([1.0], [0.0])), ("kl", ([0.0], [1.0]))):
                for rows, keep_N in (
                    ("boundary", teacher.boundary_N),
                    ("other", ~teacher.boundary_N),
                ):
                    labels_N = teacher.labels_N.where(keep_N, IGNORE)
                    term = self.teacher_head.loss(
                        rows_KNH, teacher_rows.targets_NH, labels_N, *weights
                    ).loss_sum
                    (gradient,) = torch.autograd.grad(term, leaf_BSD, retain_graph=True)
                    square = (gradient.float() / totals.teacher_rows).square().sum()
                    report.norms[f"gradient/{name}_{rows}"] = square
            ce_sum, _ = student_ce(self.student, leaf_BSD, batch.student, self.losses)
            (gradient,) = torch.autograd.grad(ce_sum, leaf_BSD)
            square = (gradient.float() / totals.student_rows).square().sum()
            report.norms["gradient/student_ce"] = square


def exchanged_questions(teacher: TeacherBatch, student_length: int) -> Tensor:
    """packing.source_P with each sequence's question states taken from the next sequence's turn.

    Counted back from a question's last row, so that boundary rows meet boundary rows; what the
    other's sequence does not have is its first row.
    """
    packing = teacher.packing
    num_rows = len(teacher.boundary_N)  # of the mixed pass, which comes first
    ends = packing.loss_rows[:num_rows][teacher.boundary_N]  # last question row of each turn
    source_P = packing.source_P.long()
    sequence_of_turn = packing.sequence_P[ends]
    num_mixed = int(sequence_of_turn[-1]) + 1
    following = (sequence_of_turn + 1) % num_mixed
    first_turn_of = torch.searchsorted(sequence_of_turn, following)
    other_end = source_P[ends[first_turn_of]]  # its flat student row
    rows = torch.arange(len(source_P), device=source_P.device)
    turn_P = torch.searchsorted(ends, rows).clamp(max=len(ends) - 1)
    back_P = ends[turn_P] - rows
    other_P = other_end[turn_P]
    first_P = torch.div(other_P, student_length, rounding_mode="floor") * student_length
    moved_P = torch.maximum(other_P - back_P, first_P)
    return torch.where(source_P >= 0, moved_P, source_P).to(packing.source_P.dtype)
