"""Turns logits into losses and dlogits, in place, in torch: the CPU's path, the kernels' twin.

Shapes: K passes, n rows of a chunk, V vocabulary.

    d loss / d logits(r) = weight * (on_q q - on_p p - on_label onehot(y))

covers both uses: CE + KL through the teacher's head (a + b, b, a), and the student's CE (1, 0, 1).
On the CPU rows are taken in blocks that stay in the cache. The logits then cross memory once for
the GEMM that writes the logits and once for the GEMM that reads dlogits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.ops.head_loss.contract import Head
from genrecal_ds.ops.softcap import softcap_

CPU_BLOCK_BYTES = 1 << 20  # one matrix of logits; a core's second-level cache


class Coefficients(NamedTuple):
    """The coefficients of one pass in the formula above."""

    on_q: float
    on_p: float
    on_label: float


class RowStats(NamedTuple):
    """Statistics of the rows of a chunk. kl is 0 without teacher logits."""

    lse_Kn: Tensor  # log-sum-exp of the student's logits
    label_logit_Kn: Tensor
    kl_Kn: Tensor
    top1_Kn: Tensor  # int64
    teacher_top1_n: Tensor | None


class Chunk(NamedTuple):
    """The input of an epilogue, which overwrites both matrices of logits."""

    student_KnV: Tensor  # the GEMM's result, without bias, scale and softcap
    teacher_nV: Tensor | None  # likewise
    labels_n: Tensor  # IGNORE, or a column
    row_weights_n: Tensor  # 0 on ignored rows
    coefficients: Sequence[Coefficients]  # one for each pass
    head: Head
    needs_grad: bool
    dlogits_mV: (
        Tensor  # [K n, V], to be written: student_KnV itself, or of the head's low precision
    )


def softmax_epilogue_(chunk: Chunk) -> RowStats:
    """Return RowStats; with needs_grad write d loss / d (rows @ weight.T) into dlogits_mV."""
    student_KnV, teacher_nV, head = chunk.student_KnV, chunk.teacher_nV, chunk.head
    columns_n, is_bad_n = _columns_of(chunk.labels_n, student_KnV.shape[-1])
    dlogits_KnV = chunk.dlogits_mV.view(student_KnV.shape) if chunk.needs_grad else student_KnV
    num_passes, num_rows, _ = student_KnV.shape
    kl_Kn = student_KnV.new_zeros(num_passes, num_rows)
    lse_Kn, label_logit_Kn = torch.empty_like(kl_Kn), torch.empty_like(kl_Kn)
    top1_Kn = columns_n.new_empty(num_passes, num_rows)
    teacher_top1_n = None if teacher_nV is None else torch.empty_like(columns_n)
    block = _block_rows(student_KnV)
    for start in range(0, num_rows, block):
        part = slice(start, start + block)
        teacher = None
        if teacher_nV is not None:
            assert teacher_top1_n is not None
            transform_(teacher_nV[part], head, needs_slope=False)
            teacher = _Teacher(teacher_nV[part])
            teacher_top1_n[part] = teacher.top1_n
        for k, coefficient in enumerate(chunk.coefficients):
            logits_bV, label_b1 = student_KnV[k, part], columns_n[part].unsqueeze(-1)
            slope_bV = transform_(logits_bV, head, chunk.needs_grad)
            label_logit_Kn[k, part] = logits_bV.gather(-1, label_b1).squeeze(-1)
            top_b1, top1_b1 = logits_bV.max(-1, keepdim=True)
            top1_Kn[k, part] = top1_b1.squeeze(-1)
            logits_bV.sub_(top_b1)
            dot_b = None if teacher is None else teacher.dot(logits_bV)
            sum_b1 = logits_bV.exp_().sum(-1, keepdim=True)
            log_sum_b = sum_b1.log().squeeze(-1)
            lse_Kn[k, part] = log_sum_b + top_b1.squeeze(-1)
            if teacher is not None and dot_b is not None:
                kl_Kn[k, part] = dot_b - teacher.log_sum_b + log_sum_b
            if not chunk.needs_grad:
                continue
            weight_b1 = chunk.row_weights_n[part].unsqueeze(-1) * head.scale
            logits_bV.mul_(weight_b1 * coefficient.on_q / sum_b1)
            if teacher is not None and coefficient.on_p:
                on_p_b1 = weight_b1 * (-coefficient.on_p) / teacher.sum_b1
                logits_bV.addcmul_(teacher.exp_bV, on_p_b1)
            logits_bV.scatter_add_(-1, label_b1, -coefficient.on_label * weight_b1)
            if slope_bV is not None:
                logits_bV.mul_(slope_bV)
            if dlogits_KnV.dtype != logits_bV.dtype:  # else it is the same memory
                dlogits_KnV[k, part] = logits_bV
    label_logit_Kn.masked_fill_(is_bad_n, float("nan"))
    return RowStats(lse_Kn, label_logit_Kn, kl_Kn, top1_Kn, teacher_top1_n)


class _Teacher:
    """Holds a block of the teacher's logits, shifted by their maximum, and their exponentials."""

    def __init__(self, logits_bV: Tensor):
        top_b1, top1_b1 = logits_bV.max(-1, keepdim=True)
        self.top1_n = top1_b1.squeeze(-1)
        self.shifted_bV = logits_bV.sub_(top_b1)
        self.exp_bV = self.shifted_bV.exp()
        self.sum_b1 = self.exp_bV.sum(-1, keepdim=True)
        self.log_sum_b = self.sum_b1.log().squeeze(-1)

    def dot(self, student_shifted_bV: Tensor) -> Tensor:
        """Return sum p (t - s) of shifted logits. The difference is taken before the sum: it is
        small where the two sides agree, while t and s are large."""
        difference_bV = self.shifted_bV - student_shifted_bV
        return torch.linalg.vecdot(self.exp_bV, difference_bV) / self.sum_b1.squeeze(-1)


def _columns_of(labels_n: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return (a column that may be read for every label, which labels are outside the vocabulary).

    A label outside the vocabulary makes its row's loss NaN. On CUDA no check came before, and an
    index out of bounds would end the process without saying where.
    """
    is_inside_n = (labels_n >= 0) & (labels_n < vocabulary)
    return labels_n.where(is_inside_n, 0), ~is_inside_n & (labels_n != IGNORE)


def _block_rows(logits_KnV: Tensor) -> int:
    """Return how many rows fit in the cache together; on CUDA all, to launch few kernels."""
    if logits_KnV.is_cuda:
        return max(1, logits_KnV.shape[1])
    return max(1, CPU_BLOCK_BYTES // (logits_KnV.shape[2] * logits_KnV.element_size()))


def transform_(logits_nV: Tensor, head: Head, needs_slope: bool) -> Tensor | None:
    """Apply bias, scale and softcap in place; with needs_slope return the softcap's slope."""
    if head.bias_V is not None:
        logits_nV.add_(head.bias_V)
    if head.scale != 1.0:
        logits_nV.mul_(head.scale)
    return softcap_(logits_nV, head.softcap, needs_slope)
