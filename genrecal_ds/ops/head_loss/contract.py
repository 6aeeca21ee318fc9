"""Defines what head_loss takes and gives, and refuses bad input.

Shapes: K passes that share teacher rows and labels (1, or 2 in stage 1: mixed, regular),
N loss rows, H teacher width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genrecal_ds.ops.checks import check_labels, expect, shown


class Head(NamedTuple):
    """A frozen language head: logits = softcap(scale * (rows @ weight.T + bias))."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None  # columns from here on are padding: they count in no softmax

    def without_padding(self) -> "Head":
        """The same head over its real columns alone; a view, nothing is copied."""
        if self.valid_vocab is None:
            return self
        bias = None if self.bias_V is None else self.bias_V[: self.valid_vocab]
        return Head(self.weight_VH[: self.valid_vocab], bias, self.scale, self.softcap)


class Divergence(NamedTuple):
    """How far the student's q is from the teacher's p. `mix` is read by skew_kl and jsd only.

    forward_kl  KL(p || q)                                          the paper's L_kl
    reverse_kl  KL(q || p)
    skew_kl     KL(p || mix p + (1 - mix) q)                        DistiLLM, arXiv 2402.03898
    jsd         mix KL(p || m) + (1 - mix) KL(q || m),              GKD, arXiv 2306.13649
                m = mix p + (1 - mix) q
    """

    name: Literal["forward_kl", "reverse_kl", "skew_kl", "jsd"] = "forward_kl"
    mix: float = 0.5


FORWARD_KL = Divergence()


class CachedTeacher(NamedTuple):
    """All that CE + KL need of the teacher's distribution p = softmax(logits(z)), exactly.

    KL is linear in the student's logits but for their log-sum-exp, so the head's image of p is
    enough: KL(p || q) = lse(logits(r)) - r . m + constant. Made by cache_teacher.
    """

    mean_head_NH: Tensor  # m = scale * p @ W
    constant_N: Tensor  # fp32: sum p log p - scale * p . bias
    top1_N: Tensor  # int64: argmax of p


class HeadLoss(NamedTuple):
    """loss_sum carries the gradient to the rows; all other fields are detached."""

    loss_sum: Tensor  # scalar: sum over passes and rows of ce_weight * CE + kl_weight * KL
    ce_KN: Tensor  # fp32 per row; 0 where the label is -100 or the pass's CE weight is 0
    kl_KN: Tensor  # fp32 per row; 0 likewise
    top1_KN: Tensor  # bool: argmax of r equals argmax of z


def check(
    rows_KNH: Tensor,
    teacher: Tensor | CachedTeacher,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
    divergence: Divergence,
    temperature: float,
    labels_are_columns: bool = True,
) -> None:
    """Raise ValueError naming the first argument that does not fit, and what would.

    labels_are_columns: False where the head is a share of the columns that labels name.
    """
    weight = head.weight_VH
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"head.weight_VH: {shown(weight)}, expected a float matrix [V, H]")
    if rows_KNH.ndim != 3:
        raise ValueError(f"rows_KNH: {shown(rows_KNH)}, expected three dimensions [K, N, H]")
    passes, rows, width = rows_KNH.shape
    expect("head.weight_VH", weight, (weight.shape[0], width), rows_KNH)
    expect("rows_KNH", rows_KNH, (passes, rows, width), rows_KNH)
    if isinstance(teacher, CachedTeacher):
        expect("teacher.mean_head_NH", teacher.mean_head_NH, (rows, width), rows_KNH, None)
        expect("teacher.constant_N", teacher.constant_N, (rows,), rows_KNH, None)
        expect("teacher.top1_N", teacher.top1_N, (rows,), rows_KNH, torch.int64)
    else:
        expect("teacher_rows_NH", teacher, (rows, width), rows_KNH)
    expect("labels_N", labels_N, (rows,), rows_KNH, torch.int64)
    columns = weight.shape[0] if head.valid_vocab is None else head.valid_vocab
    if not 0 < columns <= weight.shape[0]:
        raise ValueError(f"head.valid_vocab: {columns}, expected 1 to {weight.shape[0]}")
    if head.bias_V is not None:
        expect("head.bias_V", head.bias_V, (weight.shape[0],), rows_KNH)
    if len(ce_weights) != passes or len(kl_weights) != passes:
        raise ValueError(
            f"ce_weights, kl_weights: {len(ce_weights)} and {len(kl_weights)} numbers, "
            f"expected {passes}, one for each pass of rows_KNH"
        )
    if temperature <= 0 or (head.softcap is not None and head.softcap <= 0):
        raise ValueError(f"temperature {temperature}, softcap {head.softcap}: expected > 0")
    if divergence.name in ("skew_kl", "jsd") and not 0 < divergence.mix < 1:
        raise ValueError(f"divergence.mix: {divergence.mix}, expected between 0 and 1")
    if labels_are_columns:
        check_labels(labels_N, columns)
    if isinstance(teacher, CachedTeacher):
        _check_cached(head, divergence, temperature)


def _check_cached(head: Head, divergence: Divergence, temperature: float) -> None:
    """The identity needs logits that are linear in r, at one temperature (docs/performance.md)."""
    check_linear(head)
    if divergence.name != "forward_kl":
        raise ValueError(f"divergence: {divergence.name}, a cached teacher knows forward_kl only")
    if temperature != 1.0:
        raise ValueError(f"temperature: {temperature}, a cached teacher belongs to temperature 1")


def check_linear(head: Head) -> None:
    """Refuse a softcap beside a cached teacher."""
    if head.softcap is not None:
        raise ValueError("head.softcap: a cached teacher is exact for linear logits only")
