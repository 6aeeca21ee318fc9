"""Defines head_loss: plain torch under autograd, all logits at once, in fp32 or more.

Shapes: K passes, N loss rows, H teacher width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from genrecal_ds import IGNORE
from genrecal_ds.ops.head_loss.contract import Head, HeadLoss
from genrecal_ds.ops.softcap import softcapped


def head_loss_reference(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
) -> HeadLoss:
    """Compute head_loss with about nine [K, N, V] matrices; for tests and small vocabularies."""
    valid_N = labels_N != IGNORE
    label_N1 = labels_N.clamp(min=0).unsqueeze(-1)
    # Widened once: two casts would round the two halves of the gradient separately.
    rows_KNH = rows_KNH.to(torch.promote_types(rows_KNH.dtype, torch.float32))
    logits_KNV = logits(head, rows_KNH)
    teacher_logits_NV = logits(head, teacher_rows_NH.detach())
    kl_KN = _forward_kl(teacher_logits_NV, logits_KNV)
    top1_KN = (logits_KNV.argmax(-1) == teacher_logits_NV.argmax(-1)) & valid_N
    log_q_KNV = logits_KNV.log_softmax(-1)
    ce_KN = -log_q_KNV.gather(-1, label_N1.expand(len(rows_KNH), -1, -1)).squeeze(-1)

    loss_sum = ce_KN.new_zeros(())
    for k, (a, b) in enumerate(zip(ce_weights, kl_weights, strict=True)):
        row_N = a * ce_KN[k] if b == 0 else a * ce_KN[k] + b * kl_KN[k]
        loss_sum = loss_sum + row_N.where(valid_N, 0).sum()
    counts_ce_K1 = ce_KN.new_tensor([a != 0 for a in ce_weights]).unsqueeze(-1)
    counts_kl_K1 = ce_KN.new_tensor([b != 0 for b in kl_weights]).unsqueeze(-1)
    return HeadLoss(
        loss_sum,
        (ce_KN * counts_ce_K1).detach().where(valid_N, 0),
        (kl_KN * counts_kl_K1).detach().where(valid_N, 0),
        top1_KN,
    )


def logits(head: Head, rows: Tensor) -> Tensor:
    """Return logits [.., V] of rows [.., H] after bias, scale and softcap; fp32, or fp64."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    bias = None if head.bias_V is None else head.bias_V.detach().to(dtype)
    values = linear(rows.to(dtype), head.weight_VH.detach().to(dtype), bias) * head.scale
    return softcapped(values, head.softcap)


def _forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return KL(p || q) per row: p = softmax(teacher's logits), q = softmax(student's logits)."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
