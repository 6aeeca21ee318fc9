"""GenRecal: two bodies -> token_align -> Recalibrator -> the teacher's frozen head -> losses.

    align    L_ar + L_kl (mixed)  +  L_ar + L_kl (regular, the regulariser of Algorithm 2)
    distill  L_ar + L_kl (mixed)  +  CE(head_s(z_as), gt_s)

Shapes: B conversations, S student length, D student width, H teacher width, A teacher rows
entering the Recalibrator, N teacher loss rows, K passes (mixed; in align also regular),
M student loss rows.
"""

import torch
from torch import Tensor, nn

from genrecal_ds.data.batch import IGNORE, PairBatch, TeacherBatch
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.objectives.answer_inputs import AnswerInputs
from genrecal_ds.objectives.report import Clock, Report
from genrecal_ds.objectives.supervised import student_ce
from genrecal_ds.recipe.stage_config import LossConfig


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
        answers: AnswerInputs | None = None,
    ):
        """answers: which answer rows the passes read; default the paper's."""
        super().__init__()
        self.student, self.recalibrator = student, recalibrator
        self.teacher_head, self.losses, self.trains_student = teacher_head, losses, trains_student
        self.with_regular = not trains_student and losses.regularizer != "none"
        self.clock, self.answers = clock or Clock(), answers or AnswerInputs()
        own = {"teacher": ("mixed",), "student": ("aligned",), "both": ("mixed", "aligned")}
        # In the order of data/batch.py; "mixed" and "regular" are the paper's.
        self.passes = (*own[self.answers.config.rows], *(("regular",) if self.with_regular else ()))

    def forward(
        self, batch: PairBatch, teacher_rows: TeacherRows, totals: Totals, probe: bool = False
    ) -> tuple[Tensor, Report]:
        """(loss, Report). probe adds the student's gradient norm per term to the report."""
        report = Report()
        teacher_rows = self.answered(batch, teacher_rows)
        with self.clock.phase("student"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_student):
                hidden_BSD = self.student.body(*batch.student.inputs)
        loss = self.teacher_loss(hidden_BSD, batch, teacher_rows, totals, report)
        if self.trains_student:
            loss = loss + self.student_loss(hidden_BSD, batch, totals, report)
        if probe:
            self.probe(hidden_BSD, batch, teacher_rows, totals, report)
        return loss, report

    def answered(self, batch: PairBatch, teacher_rows: TeacherRows) -> TeacherRows:
        """With the answer rows that the passes read; draws what is random about them."""
        assert batch.teacher is not None
        inputs_AH = self.answers(teacher_rows.inputs_AH, batch.teacher, self.training)
        return teacher_rows._replace(inputs_AH=inputs_AH)

    def teacher_loss(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> Tensor:
        """The teacher's terms for hidden states of the student; teacher_rows as answered."""
        assert batch.teacher is not None
        with self.clock.phase("recalibrator"):
            rows_KNH = self._recalibrate(hidden_BSD, batch.teacher, teacher_rows)
        with self.clock.phase("head"):
            return self._teacher_terms(rows_KNH, batch.teacher, teacher_rows, totals, report)

    def student_loss(
        self, hidden_BSD: Tensor, batch: PairBatch, totals: Totals, report: Report
    ) -> Tensor:
        """The student's own term, of a student that trains."""
        # ZeRO-3 adds to a STALE gradient when a parameter first gets one late in a window;
        # this keeps the whole body in every micro-step's graph, whatever the terms are.
        loss = 0.0 * hidden_BSD.sum()
        if self.losses.student_ce:
            with self.clock.phase("head"):
                loss = self._student_term(hidden_BSD, batch, totals, report) + loss
        return loss

    def probe(
        self,
        hidden_BSD: Tensor,
        batch: PairBatch,
        teacher_rows: TeacherRows,
        totals: Totals,
        report: Report,
    ) -> None:
        """Adds to the report what each class of rows learns, and from where."""
        assert batch.teacher is not None
        self._probe_questions(hidden_BSD, batch.teacher, teacher_rows, report)
        if self.trains_student:
            self._probe_gradients(hidden_BSD, batch, teacher_rows, totals, report)

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
        """L_ar + L_kl of every pass through the frozen head, one head_loss call where labels are
        the same."""
        losses, loss_sum = self.losses, rows_KNH.new_zeros(())
        paper = [name for name in self.passes if name != "aligned"]
        for names in (paper, ["aligned"] * ("aligned" in self.passes)):
            if not names:
                continue
            numbers = [self.passes.index(name) for name in names]
            rows = rows_KNH if len(numbers) == len(rows_KNH) else rows_KNH[numbers]
            labels_N = self._labels(teacher, names[0])
            ce_weights = [self._weight(name, "ce", losses.ar) for name in names]
            kl_weights = [self._weight(name, "kl", losses.kl) for name in names]
            out = self.teacher_head.loss(
                rows, teacher_rows.targets_NH, labels_N, ce_weights, kl_weights
            )
            valid_N = labels_N != IGNORE
            for k, name in enumerate(names):
                prefix = "" if name == self.passes[0] else f"{name}_"
                report.add_rows(f"{prefix}ar", out.ce_KN[k], teacher.boundary_N, valid_N)
                report.add_rows(f"{prefix}kl", out.kl_KN[k], teacher.boundary_N, valid_N)
                report.add_rows(f"{prefix}agree", out.top1_KN[k], teacher.boundary_N, valid_N)
            loss_sum = out.loss_sum if names is paper else loss_sum + out.loss_sum
        if self.with_regular and losses.regularizer == "mse":
            valid_N = self._labels(teacher, "regular") != IGNORE
            difference_NH = rows_KNH[-1] - teacher_rows.targets_NH
            error_N = difference_NH.float().square().mean(-1) * valid_N
            report.add_rows("regular_mse", error_N, teacher.boundary_N, valid_N)
            loss_sum = loss_sum + error_N.sum()
        if losses.boundary_weight != 1:
            loss_sum = loss_sum + self._more_of_boundaries(rows_KNH[:1], teacher, teacher_rows)
        return loss_sum / totals.teacher_rows

    def _labels(self, teacher: TeacherBatch, name: str) -> Tensor:
        """[N] of one pass, IGNORE where its row cannot know what the label follows."""
        labels_N = teacher.labels_N
        if not self.losses.boundary:
            labels_N = labels_N.masked_fill(teacher.boundary_N, IGNORE)
        if name == "aligned":
            assert teacher.exact_N is not None
            labels_N = labels_N.masked_fill(~teacher.exact_N, IGNORE)
        return labels_N

    def _weight(self, name: str, term: str, weight: float) -> float:
        return float(term in self.losses.regularizer) if name == "regular" else weight

    def _more_of_boundaries(
        self, rows_1NH: Tensor, teacher: TeacherBatch, teacher_rows: TeacherRows
    ) -> Tensor:
        """What boundary rows weigh beyond 1; they are few, so they are read twice."""
        more, rows = self.losses.boundary_weight - 1, teacher.boundary_N.nonzero().flatten()
        return self.teacher_head.loss(
            rows_1NH[:, rows], teacher_rows.targets_NH[rows],
            self._labels(teacher, self.passes[0])[rows],
            [more * self.losses.ar], [more * self.losses.kl],
        ).loss_sum  # fmt: skip

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
        """L_ar and L_kl of the first pass with another sample's question states, and with none."""
        labels_N, packing = self._labels(teacher, self.passes[0]), teacher.packing
        exchanged = packing._replace(source_P=exchanged_questions(teacher, hidden_BSD.shape[1]))
        is_alone = len(hidden_BSD) == 1  # no other sample to exchange with
        for name, hidden, of in (
            ("shuffled", hidden_BSD, exchanged),
            ("zeroed", without_questions(hidden_BSD, teacher), packing),
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
                    labels_N = self._labels(teacher, self.passes[0]).where(keep_N, IGNORE)
                    term = self.teacher_head.loss(
                        rows_KNH, teacher_rows.targets_NH, labels_N, *weights
                    ).loss_sum
                    (gradient,) = torch.autograd.grad(term, leaf_BSD, retain_graph=True)
                    square = (gradient.float() / totals.teacher_rows).square().sum()
                    report.norms[f"gradient/{name}_{rows}"] = square
            square = leaf_BSD.new_zeros((), dtype=torch.float32)
            if self.losses.student_ce:  # else it is measured without a gradient
                ce_sum, _ = student_ce(self.student, leaf_BSD, batch.student, self.losses)
                (gradient,) = torch.autograd.grad(ce_sum, leaf_BSD)
                square = (gradient.float() / totals.student_rows).square().sum()
            report.norms["gradient/student_ce"] = square


def answer_rows(teacher: TeacherBatch) -> Tensor:
    """bool [P]: packed rows of the first pass's answers; rows of other passes are none."""
    packing = teacher.packing
    num_rows = len(teacher.boundary_N)  # of the first pass
    is_answer_P = torch.zeros_like(packing.source_P, dtype=torch.bool)
    is_answer_P[packing.loss_rows[:num_rows] + 1] = True  # each stands behind its loss row
    return is_answer_P


def without_questions(hidden_BSD: Tensor, teacher: TeacherBatch) -> Tensor:
    """Zeros but for the student's rows that the first pass reads in the place of answers."""
    source_P = teacher.packing.source_P.long()
    is_answer_P = answer_rows(teacher)
    kept = source_P[is_answer_P & (source_P >= 0)]
    # A question's last row stands for an answer of which nothing is read yet: still a question's.
    kept = kept[~torch.isin(kept, source_P[~is_answer_P])]
    rows = hidden_BSD.flatten(0, 1)
    zeroed = torch.zeros_like(rows).index_copy(0, kept, rows[kept])
    return zeroed.view_as(hidden_BSD)


def exchanged_questions(teacher: TeacherBatch, student_length: int) -> Tensor:
    """packing.source_P with the first pass's question states taken from the next sequence's turn.

    Counted back from a question's last row, so that boundary rows meet boundary rows; what the
    other's sequence does not have is its first row.
    """
    packing = teacher.packing
    num_rows = len(teacher.boundary_N)  # of the first pass
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
    is_answer_P = answer_rows(teacher)
    is_first_P = rows <= is_answer_P.nonzero()[-1]
    is_question_P = (source_P >= 0) & ~is_answer_P & is_first_P
    return torch.where(is_question_P, moved_P, source_P).to(packing.source_P.dtype)
