"""Gathers student and teacher rows into the Recalibrator's packed input, in one call.

Shapes: B batch, S student length, D student width, H teacher width, A teacher rows used,
R = B*S + A source rows, U most uses of one row, P packed rows.

Forward: one GEMM (Proj-pre of every teacher row, once) and one gather. Backward: each source row
sums its uses, read from the collator's map, then one GEMM gives dW. The map avoids atomics and
zero-fill and gives the same bits every time. The host never waits for a number from the device.
"""

from typing import Literal

import torch
from torch import Tensor

from genrecal_ds.ops.checks import expect
from genrecal_ds.ops.choice import chosen
from genrecal_ds.ops.token_align.reference import sum_uses, token_align_reference

__all__ = ["token_align"]


def token_align(
    student_hidden_BSD: Tensor,
    teacher_rows_AH: Tensor,
    proj_pre_weight_DH: Tensor,
    source_P: Tensor,
    uses_RU: Tensor,
    *,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> Tensor:
    """Project the teacher's rows (Proj-pre) and gather both sides into packed_PD.

    source_P (int32): i >= 0 takes row i of student_hidden [B*S], i < 0 teacher row -i-1.
    uses_RU (int32): the packed rows that each source row went to, student rows first, -1 where
    there are fewer; uses_RU must invert source_P (data.batch makes both). All tensors share one
    float dtype. Gradients flow to the student's rows and to the weight, never to the teacher's
    rows; dW sums over all uses of a row. Backward does not keep the weight: under ZeRO-3 the module
    may release its weight after this call. Raises ValueError naming the argument that does not fit.
    Source: paper section 3.2, `[z_qs ; Proj-pre(z_al)]` and `[Proj-pre(z_ql) ; Proj-pre(z_al)]`.
    """
    if student_hidden_BSD.ndim != 3 or not student_hidden_BSD.is_floating_point():
        raise ValueError(
            f"student_hidden_BSD: {list(student_hidden_BSD.shape)} {student_hidden_BSD.dtype}, "
            f"expected floats [B, S, D]"
        )
    batch, length, width = student_hidden_BSD.shape
    like, teacher_rows = student_hidden_BSD, teacher_rows_AH.shape[0]
    teacher_width = teacher_rows_AH.shape[-1]
    expect("student_hidden_BSD", student_hidden_BSD, (batch, length, width), like)
    expect("teacher_rows_AH", teacher_rows_AH, (teacher_rows, teacher_width), like)
    expect("proj_pre_weight_DH", proj_pre_weight_DH, (width, teacher_width), like)
    expect("source_P", source_P, (source_P.numel(),), like, torch.int32)
    uses = uses_RU.shape[-1]
    expect("uses_RU", uses_RU, (batch * length + teacher_rows, uses), like, torch.int32)
    _check_maps(source_P, uses_RU, batch * length, teacher_rows)
    if impl == "reference":
        return token_align_reference(
            student_hidden_BSD, teacher_rows_AH, proj_pre_weight_DH, source_P
        )
    return torch.ops.genrecal_ds.token_align(
        student_hidden_BSD, teacher_rows_AH.detach(), proj_pre_weight_DH, source_P, uses_RU,
        chosen(impl, student_hidden_BSD),
    )  # fmt: skip


def _check_maps(source_P: Tensor, uses_RU: Tensor, student_rows: int, teacher_rows: int) -> None:
    """Check ranges of the maps, on the CPU only: on CUDA reading them would stall the stream."""
    if source_P.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, values, first, last in (
        ("source_P", source_P, -teacher_rows, student_rows - 1),
        ("uses_RU", uses_RU, -1, source_P.numel() - 1),
    ):
        if values.numel() and not (first <= values.min() and values.max() <= last):
            raise ValueError(
                f"{name}: {int(values.min())} to {int(values.max())}, expected {first} to {last}"
            )


@torch.library.custom_op("genrecal_ds::token_align", mutates_args=())
def _token_align(
    student_hidden_BSD: Tensor,
    teacher_rows_AH: Tensor,
    weight_DH: Tensor,
    source_P: Tensor,
    uses_RU: Tensor,
    implementation: str,
) -> Tensor:
    if implementation == "torch":
        return token_align_reference(student_hidden_BSD, teacher_rows_AH, weight_DH, source_P)
    from genrecal_ds.ops.token_align.kernels import gather

    projected_AD = torch.mm(teacher_rows_AH, weight_DH.t())
    return gather(student_hidden_BSD.flatten(0, 1), projected_AD, source_P)


@torch.library.custom_op("genrecal_ds::token_align_backward", mutates_args=())
def _token_align_backward(
    grad_PD: Tensor,
    teacher_rows_AH: Tensor,
    uses_RU: Tensor,
    needs_student: bool,
    needs_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return (d student rows [B*S, D], dW [D, H]); a gradient that is not needed is empty."""
    student_rows = uses_RU.shape[0] - teacher_rows_AH.shape[0]
    d_student, d_weight = grad_PD.new_empty(0), grad_PD.new_empty(0)
    sums = sum_uses
    if implementation == "triton":
        from genrecal_ds.ops.token_align.kernels import sum_uses_triton as sums
    if needs_student:
        d_student = sums(grad_PD, uses_RU[:student_rows])
    if needs_weight:
        d_weight = torch.mm(sums(grad_PD, uses_RU[student_rows:]).t(), teacher_rows_AH)
    return d_student, d_weight


@_token_align.register_fake
def _(student_hidden_BSD, teacher_rows_AH, weight_DH, source_P, uses_RU, implementation):
    return student_hidden_BSD.new_empty(source_P.shape[0], student_hidden_BSD.shape[-1])


@_token_align_backward.register_fake
def _(grad_PD, teacher_rows_AH, uses_RU, needs_student, needs_weight, implementation):
    width, (teacher_rows, teacher_width) = grad_PD.shape[1], teacher_rows_AH.shape
    student_rows = uses_RU.shape[0] - teacher_rows
    return (
        grad_PD.new_empty((student_rows, width) if needs_student else 0),
        grad_PD.new_empty((width, teacher_width) if needs_weight else 0),
    )


def _save(ctx, inputs, output):
    student_hidden_BSD, teacher_rows_AH, _, _, uses_RU, ctx.implementation = inputs
    ctx.student_shape = student_hidden_BSD.shape
    ctx.save_for_backward(teacher_rows_AH, uses_RU)


def _backward(ctx, grad_PD):
    needs_student, _, needs_weight = ctx.needs_input_grad[:3]
    d_student, d_weight = torch.ops.genrecal_ds.token_align_backward(
        grad_PD.contiguous(), *ctx.saved_tensors, needs_student, needs_weight, ctx.implementation
    )
    return (
        d_student.view(ctx.student_shape) if needs_student else None,
        None,
        d_weight if needs_weight else None,
        None,
        None,
        None,
    )


_token_align.register_autograd(_backward, setup_context=_save)
