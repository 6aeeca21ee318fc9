"""The definition of head_loss, in plain torch, row chunk by row chunk.

Shapes: K passes that share teacher rows and labels (1, or 2 in stage 1: mixed, regular),
N loss rows, H teacher width, V vocabulary.

The head is frozen and linear up to its softcap, so the gradient for the rows is formed in the
forward, while a chunk's logits exist; nothing of size [N, V] outlives its chunk:

    p = softmax(head(z)),  q = softmax(head(r))
    CE = lse(head(r)) - head(r)[y]          d CE / d logits = q - onehot(y)
    KL = sum p (log p - log q)              d KL / d logits = q - p          (teacher first)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genrecal_ds.ops import IGNORE

CHUNK_BYTES = 1 << 28  # of fp32 logits held at once: (K + 1) * rows * V * 4


class Head(NamedTuple):
    """A frozen language head: logits = softcap(scale * (rows @ weight.T + bias))."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class HeadLoss(NamedTuple):
    """loss_sum carries the gradient to the rows; all other fields are detached."""

    loss_sum: Tensor  # scalar: sum over passes and rows of ce_weight * CE + kl_weight * KL
    ce_KN: Tensor  # per row; 0 where the label is -100 or the pass's CE weight is 0
    kl_KN: Tensor  # per row; 0 likewise
    top1_KN: Tensor  # bool: argmax of r equals argmax of z


def head_loss_reference(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
) -> HeadLoss:
    """a*CE + b*KL for each of K passes, summed over the rows whose label is not -100.

    rows_KNH: any float dtype; labels_N: int64 in the TEACHER's vocabulary. Losses are fp32.
    Raises ValueError when the shapes do not fit each other.
    Source: paper section 3.3, L_ar and L_kl.
    """
    num_passes, num_rows, width = rows_KNH.shape
    if teacher_rows_NH.shape != (num_rows, width) or labels_N.shape != (num_rows,):
        raise ValueError(
            f"head_loss: rows {tuple(rows_KNH.shape)}, teacher rows {tuple(teacher_rows_NH.shape)} "
            f"and labels {tuple(labels_N.shape)} do not fit"
        )
    if len(ce_weights) != num_passes or len(kl_weights) != num_passes:
        raise ValueError(f"head_loss: {num_passes} passes need {num_passes} CE and KL weights")
    weights = rows_KNH.new_tensor([ce_weights, kl_weights], dtype=torch.float32)
    loss_sum, ce_KN, kl_KN, top1_KN = _HeadLoss.apply(
        rows_KNH, teacher_rows_NH, labels_N, head, weights
    )
    return HeadLoss(loss_sum, ce_KN, kl_KN, top1_KN)


def logits(head: Head, rows: Tensor) -> Tensor:
    """fp32 logits [.., V] of rows [.., H] after bias, scale and softcap."""
    values = torch.nn.functional.linear(rows.to(head.weight_VH.dtype), head.weight_VH, head.bias_V)
    values = values.float() * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_KNH, teacher_rows_NH, labels_N, head, weights_2K):
        num_passes, num_rows, _ = rows_KNH.shape
        needs_grad = ctx.needs_input_grad[0]
        ce_KN = rows_KNH.new_zeros(num_passes, num_rows, dtype=torch.float32)
        kl_KN, top1_KN = torch.zeros_like(ce_KN), torch.zeros_like(ce_KN, dtype=torch.bool)
        grad_KNH = torch.zeros_like(rows_KNH) if needs_grad else None
        vocabulary = head.weight_VH.shape[0]
        chunk = max(1, CHUNK_BYTES // (4 * vocabulary * (num_passes + 1)))
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            ce, kl, top1, grad = _chunk(
                rows_KNH[:, rows],
                teacher_rows_NH[rows],
                labels_N[rows],
                head,
                weights_2K,
                needs_grad,
            )
            ce_KN[:, rows], kl_KN[:, rows], top1_KN[:, rows] = ce, kl, top1
            if grad_KNH is not None:
                grad_KNH[:, rows] = grad
        loss_sum = (weights_2K[0] @ ce_KN + weights_2K[1] @ kl_KN).sum()
        if needs_grad:
            ctx.save_for_backward(grad_KNH)
        ctx.mark_non_differentiable(ce_KN, kl_KN, top1_KN)
        return loss_sum, ce_KN, kl_KN, top1_KN

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        (grad_KNH,) = ctx.saved_tensors
        return grad_KNH * grad_loss.to(grad_KNH.dtype), None, None, None, None


def _chunk(rows_KnH, teacher_rows_nH, labels_n, head, weights_2K, needs_grad):
    """Losses per row of one chunk and, if wanted, d(loss_sum)/d(rows), scaled by the weights."""
    valid_n = labels_n != IGNORE
    label_n1 = labels_n.clamp(min=0).unsqueeze(-1)
    logits_KnV = logits(head, rows_KnH)
    log_q_KnV = logits_KnV.log_softmax(-1)
    log_p_nV = logits(head, teacher_rows_nH).log_softmax(-1)
    p_nV = log_p_nV.exp()
    top1_Kn = (log_q_KnV.argmax(-1) == log_p_nV.argmax(-1)) & valid_n

    ce_weight_K11, kl_weight_K11 = weights_2K[0].view(-1, 1, 1), weights_2K[1].view(-1, 1, 1)
    index = label_n1.expand(rows_KnH.shape[0], -1, -1)
    ce_Kn = -log_q_KnV.gather(-1, index).squeeze(-1) * valid_n * (ce_weight_K11.squeeze(-1) != 0)
    kl_Kn = (p_nV * (log_p_nV - log_q_KnV)).sum(-1) * valid_n * (kl_weight_K11.squeeze(-1) != 0)
    if not needs_grad:
        return ce_Kn, kl_Kn, top1_Kn, None

    d_logits = (ce_weight_K11 + kl_weight_K11) * log_q_KnV.exp() - kl_weight_K11 * p_nV
    d_logits.scatter_add_(-1, index, -ce_weight_K11.expand_as(index))
    d_logits *= valid_n.unsqueeze(-1) * head.scale
    if head.softcap is not None:  # d softcap(x)/dx = 1 - tanh^2
        d_logits *= 1 - (logits_KnV / head.softcap) ** 2
    grad = d_logits.to(head.weight_VH.dtype) @ head.weight_VH
    return ce_Kn, kl_Kn, top1_Kn, grad.to(rows_KnH.dtype)
