"""Computes a*CE + b*KL through the frozen teacher head without holding all logits at once.

Shapes: K passes that share teacher rows and labels (1, or 2 in stage 1: mixed, regular),
N loss rows, H teacher width, V vocabulary.

`impl`, in this package's ops:
    auto        triton on CUDA tensors, else torch; both chunk by chunk
    triton      the epilogue as Triton kernels
    torch       the epilogue in torch, any device
    reference   the definition: all logits at once, under autograd
An explicit choice never falls back.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from genrecal_ds.ops.choice import chosen
from genrecal_ds.ops.head_loss.chunked import epilogue_of, head_loss_forward
from genrecal_ds.ops.head_loss.contract import Head, HeadLoss, check
from genrecal_ds.ops.head_loss.reference import head_loss_reference

__all__ = ["Head", "HeadLoss", "head_loss"]


def head_loss(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
    *,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> HeadLoss:
    """Sum ce_weight * CE + kl_weight * KL of K passes over the rows whose label is not -100.

    KL is KL(p || q), forward: p the teacher's distribution, q the student's. rows_KNH and the
    teacher's own rows teacher_rows_NH have the head's dtype. labels_N: int64 in the TEACHER's
    vocabulary. Losses are fp32, in nats. Only loss_sum is differentiable, and only with respect to
    rows_KNH: head and teacher are frozen. Raises ValueError naming the argument that does not fit.
    On CUDA labels are not checked first: a label outside the vocabulary makes its row's loss NaN
    (`reference` asserts). Source: paper section 3.3, L_ar and L_kl.
    """
    check(rows_KNH, teacher_rows_NH, labels_N, head, ce_weights, kl_weights)
    if impl == "reference":
        return head_loss_reference(
            rows_KNH, teacher_rows_NH, labels_N, head, ce_weights, kl_weights
        )
    loss_sum, ce_KN, kl_KN, top1_KN, _ = torch.ops.genrecal_ds.head_loss(
        rows_KNH,
        teacher_rows_NH,
        labels_N,
        *head,
        [float(weight) for weight in ce_weights],
        [float(weight) for weight in kl_weights],
        chosen(impl, rows_KNH),
        torch.is_grad_enabled() and rows_KNH.requires_grad,
    )
    return HeadLoss(loss_sum, ce_KN, kl_KN, top1_KN)


@torch.library.custom_op("genrecal_ds::head_loss", mutates_args=())
def _head_loss(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
    implementation: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the registered op. The last output is the rows' gradient, which backward multiplies."""
    return head_loss_forward(
        rows_KNH,
        teacher_rows_NH,
        labels_N,
        Head(weight_VH, bias_V, scale, softcap),
        ce_weights,
        kl_weights,
        epilogue_of(implementation),
        needs_grad,
    )


@_head_loss.register_fake
def _(rows_KNH, *inputs):
    needs_grad, dtype = inputs[-1], torch.promote_types(rows_KNH.dtype, torch.float32)
    per_row = rows_KNH.new_empty(rows_KNH.shape[:2], dtype=dtype)
    return (
        per_row.new_empty(()),
        per_row,
        torch.empty_like(per_row),
        torch.empty_like(per_row, dtype=torch.bool),
        torch.empty_like(rows_KNH) if needs_grad else rows_KNH.new_empty(0),
    )


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])


def _backward(ctx, grad_loss, *unused):
    (grad_KNH,) = ctx.saved_tensors
    # No test for grad_loss == 1: reading it would stall the stream.
    return ((grad_KNH * grad_loss).to(grad_KNH.dtype), *[None] * 10)


_head_loss.register_autograd(_backward, setup_context=_save)
