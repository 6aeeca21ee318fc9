"""Measures what each class of rows learns, and from where; no parameter gets a gradient.

The mixed pass teaches the student through its question states. The probes exchange or remove those
states and measure the losses again. The probes also take each term's gradient at a detached copy
of the student's rows, so no parameter gets a gradient here.

Shapes: B conversations, S student length, D student width, H teacher width, N teacher loss rows,
M student loss rows, K passes, P rows of the Recalibrator's input.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import StudentBatch, TeacherBatch
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.language_head import LanguageHead
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.objectives.base import Seen
from genrecal_ds.objectives.report import Report


@torch.no_grad()
def probe_questions(
    recalibrator: Recalibrator, head: FrozenHead, labels_N: Tensor, seen: Seen, report: Report
) -> None:
    """L_ar and L_kl of the mixed pass with another sample's question states, and with none."""
    teacher, rows, hidden_BSD = seen.teacher, seen.teacher_rows, seen.hidden_BSD
    exchanged_P = exchanged_questions(teacher, hidden_BSD.shape[1])
    is_alone = len(hidden_BSD) == 1  # no other sample to exchange with
    for name, hidden, layout in (
        ("shuffled", hidden_BSD, teacher.layout._replace(source_P=exchanged_P)),
        ("zeroed", torch.zeros_like(hidden_BSD), teacher.layout),
    ):
        rows_NH = recalibrator(hidden, rows.inputs_AH, layout)[: len(labels_N)]
        out = head.loss(rows_NH[None], rows.targets_NH, labels_N, [1.0], [1.0])
        valid_N = (labels_N != IGNORE) & (not (is_alone and name == "shuffled"))
        for term, values_N in (("ar", out.ce_KN[0]), ("kl", out.kl_KN[0])):
            report.add_rows(f"probe/{term}_{name}", values_N, teacher.boundary_N, valid_N)


def probe_gradients(
    recalibrator: Recalibrator,
    head: FrozenHead,
    labels_N: Tensor,
    student_ce: Callable[[Tensor], Tensor] | None,
    seen: Seen,
    report: Report,
) -> None:
    """Measure each term's gradient norm at the student's hidden states, boundary rows apart.

    student_ce: the sum of the student's own cross entropy, from hidden states. None where that
    cross entropy has weight 0; its norm is then 0.
    """
    boundary_N, rows, totals = seen.teacher.boundary_N, seen.teacher_rows, seen.totals
    with torch.enable_grad():
        leaf_BSD = seen.hidden_BSD.detach().requires_grad_()
        mixed = recalibrator(leaf_BSD, rows.inputs_AH, seen.teacher.layout)[: len(labels_N)]
        for name, weights in (("ar", ([1.0], [0.0])), ("kl", ([0.0], [1.0]))):
            for of_rows, keep_N in (("boundary", boundary_N), ("other", ~boundary_N)):
                kept_N = labels_N.where(keep_N, IGNORE)
                term = head.loss(mixed[None], rows.targets_NH, kept_N, *weights).loss_sum
                (gradient,) = torch.autograd.grad(term, leaf_BSD, retain_graph=True)
                report.norms[f"gradient/{name}_{of_rows}"] = _square(gradient, totals.teacher_rows)
        square = leaf_BSD.new_zeros((), dtype=torch.float32)
        if student_ce:
            (gradient,) = torch.autograd.grad(student_ce(leaf_BSD), leaf_BSD)
            square = _square(gradient, totals.student_rows)
        report.norms["gradient/student_ce"] = square


def probe_student_rows(
    distance: Callable[[Tensor], Tensor],
    head: LanguageHead,
    rows_MD: Tensor,
    student: StudentBatch,
    total: float,
    report: Report,
) -> None:
    """Measure the gradient norm of a baseline's distance at the student's loss rows, boundary rows
    apart, and the norm of the cross entropy's gradient.

    distance: the baseline's D, summed, for rows [M, D]. total: the step's student rows.
    """
    with torch.enable_grad():
        leaf_MD = rows_MD.requires_grad_()
        (of_kd_MD,) = torch.autograd.grad(distance(leaf_MD), leaf_MD)
        ones_M = torch.ones_like(student.labels_M, dtype=torch.float32)
        ce_sum, _ = head.cross_entropy(leaf_MD, student.labels_M, ones_M)
        (of_ce_MD,) = torch.autograd.grad(ce_sum, leaf_MD)
    boundary_M = student.boundary_M
    report.norms["gradient/kd_boundary"] = _square(of_kd_MD[boundary_M], total)
    report.norms["gradient/kd_other"] = _square(of_kd_MD[~boundary_M], total)
    report.norms["gradient/student_ce"] = _square(of_ce_MD, total)


def _square(gradient: Tensor, total: float) -> Tensor:
    return (gradient.float() / total).square().sum()


def exchanged_questions(teacher: TeacherBatch, student_length: int) -> Tensor:
    """Return layout.source_P with the mixed pass's questions taken from the next sample's turn.

    Rows are counted back from a question's last row, so that boundary rows meet boundary rows.
    Where the other question is shorter, the first row of that question is repeated.
    """
    layout = teacher.layout
    num_rows = len(teacher.boundary_N)  # of one pass
    ends = layout.loss_rows[:num_rows][teacher.boundary_N]  # last question row of each turn
    source_P = layout.source_P.long()
    sequence_of_turn = layout.sequence_P[ends]
    num_mixed = int(sequence_of_turn[-1]) + 1
    following = (sequence_of_turn + 1) % num_mixed
    first_turn_of = torch.searchsorted(sequence_of_turn, following)
    other_end = source_P[ends[first_turn_of]]  # flat student row of the other question's end
    rows = torch.arange(len(source_P), device=source_P.device)
    turn_P = torch.searchsorted(ends, rows).clamp(max=len(ends) - 1)
    back_P = ends[turn_P] - rows
    other_P = other_end[turn_P]
    first_P = torch.div(other_P, student_length, rounding_mode="floor") * student_length
    moved_P = torch.maximum(other_P - back_P, first_P)
    # Only questions of the mixed pass come from the student.
    return torch.where(source_P >= 0, moved_P, source_P).to(layout.source_P.dtype)
