"""Defines what head_loss takes and gives, and refuses bad input.

Shapes: K passes that share teacher rows and labels (1, or 2 in stage 1: mixed, regular),
N loss rows, H teacher width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genrecal_ds.ops.checks import check_labels, expect, shown


class Head(NamedTuple):
    """A frozen language head: logits = softcap(scale * (rows @ weight.T + bias))."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class HeadLoss(NamedTuple):
    """loss_sum carries the gradient to the rows; all other fields are detached."""

    loss_sum: Tensor  # scalar: sum over passes and rows of ce_weight * CE + kl_weight * KL
    ce_KN: Tensor  # fp32 per row; 0 where the label is -100 or the pass's CE weight is 0
    kl_KN: Tensor  # fp32 per row; 0 likewise
    top1_KN: Tensor  # bool: argmax of r equals argmax of z


def check(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
) -> None:
    """Raise ValueError that names the first argument that does not fit, and what would fit."""
    weight = head.weight_VH
    if weight.ndim != 2 or not weight.is_floating_point() or not len(weight):
        raise ValueError(f"head.weight_VH: {shown(weight)}, expected a float matrix [V, H]")
    if rows_KNH.ndim != 3:
        raise ValueError(f"rows_KNH: {shown(rows_KNH)}, expected three dimensions [K, N, H]")
    passes, rows, width = rows_KNH.shape
    expect("head.weight_VH", weight, (weight.shape[0], width), rows_KNH)
    expect("rows_KNH", rows_KNH, (passes, rows, width), rows_KNH)
    expect("teacher_rows_NH", teacher_rows_NH, (rows, width), rows_KNH)
    expect("labels_N", labels_N, (rows,), rows_KNH, torch.int64)
    if head.bias_V is not None:
        expect("head.bias_V", head.bias_V, (weight.shape[0],), rows_KNH)
    if len(ce_weights) != passes or len(kl_weights) != passes:
        raise ValueError(
            f"ce_weights, kl_weights: {len(ce_weights)} and {len(kl_weights)} numbers, "
            f"expected {passes}, one for each pass of rows_KNH"
        )
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"head.softcap: {head.softcap}, expected > 0")
    check_labels(labels_N, weight.shape[0])
