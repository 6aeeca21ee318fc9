"""Runs the epilogue as two Triton kernels: row statistics, then dlogits. One program per row.

Shapes: K passes, n rows of a chunk, V vocabulary.

The first kernel reads S (and T) once with running maxima. KL needs no second read, since
sum e^(t - max) (t - s) is rescaled along with the sum of exponentials. The second kernel reads S
and T again and writes dlogits in the head's dtype. Offsets are int64: rows times vocabulary passes
2^31 at 14,000 rows of a 152k vocabulary. A label outside the vocabulary gives a NaN loss.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.ops.head_loss.epilogue import Chunk, Coefficients, RowStats

# A block wider than a row's registers is slower: with 32K columns the kernel measured 3x slower
# than a compiler's own code elsewhere (docs/performance.md).
BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))  # exact limits at both ends: exp gives inf or 0


@triton.jit
def _logits(
    base, columns, mask, bias, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    x = tl.load(base + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=mask, other=0.0).to(x.dtype)
    x = x * scale
    if HAS_CAP:  # ops/softcap.py, whose torch a kernel cannot call
        x = softcap * _tanh(x / softcap)
    return tl.where(mask, x, float("-inf"))


@triton.jit
def _row_statistics(
    student, teacher, labels, bias, lse, teacher_lse, label_logit, kl, top1, teacher_top1,
    num_rows, vocabulary, scale, softcap, ignore,
    HAS_TEACHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, k). All outputs are [K, n] but teacher_lse and teacher_top1, [n]."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = k * num_rows + row
    student += slot * vocabulary
    teacher += row * vocabulary
    s_max, t_max = float("-inf"), float("-inf")
    s_sum, t_sum, dot = 0.0, 0.0, 0.0
    s_top, t_top = 0, 0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < vocabulary
        s = _logits(student, columns, mask, bias, scale, softcap, HAS_BIAS, HAS_CAP)
        block_max, block_top = tl.max(s, 0, return_indices=True)
        s_top = tl.where(block_max > s_max, start + block_top, s_top)
        new_max = tl.maximum(s_max, block_max)
        s_sum = s_sum * tl.exp(s_max - new_max) + tl.sum(tl.exp(s - new_max), 0)
        s_max = new_max
        if HAS_TEACHER:
            t = _logits(teacher, columns, mask, bias, scale, softcap, HAS_BIAS, HAS_CAP)
            block_max, block_top = tl.max(t, 0, return_indices=True)
            t_top = tl.where(block_max > t_max, start + block_top, t_top)
            new_max = tl.maximum(t_max, block_max)
            rescale, e = tl.exp(t_max - new_max), tl.exp(t - new_max)
            t_sum = t_sum * rescale + tl.sum(e, 0)
            dot = dot * rescale + tl.sum(tl.where(mask, e * (t - s), 0.0), 0)
            t_max = new_max
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < vocabulary)
    at = tl.where(inside, label, 0)
    y = tl.load(student + at)
    if HAS_BIAS:
        y += tl.load(bias + at).to(y.dtype)
    y = y * scale
    if HAS_CAP:
        y = softcap * _tanh(y / softcap)
    y = tl.where(inside | (label == ignore), y, float("nan"))
    s_lse = s_max + tl.log(s_sum)
    tl.store(lse + slot, s_lse)
    tl.store(label_logit + slot, y)
    tl.store(top1 + slot, s_top)
    if HAS_TEACHER:
        t_lse = t_max + tl.log(t_sum)
        tl.store(kl + slot, dot / t_sum - t_lse + s_lse)
        if k == 0:
            tl.store(teacher_lse + row, t_lse)
            tl.store(teacher_top1 + row, t_top)


@triton.jit
def _write_dlogits(
    student, teacher, out, labels, row_weights, coefficients, bias, lse, teacher_lse,
    num_rows, vocabulary, scale, softcap,
    HAS_TEACHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, k, column block); out may be student itself."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = k * num_rows + row
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    weight = tl.load(row_weights + row) * scale
    on_q, on_p = tl.load(coefficients + 3 * k), tl.load(coefficients + 3 * k + 1)
    on_label = tl.load(coefficients + 3 * k + 2)
    s = _logits(student + slot * vocabulary, columns, mask, bias, scale, softcap, HAS_BIAS, HAS_CAP)
    d = on_q * tl.exp(s - tl.load(lse + slot))
    if HAS_TEACHER:
        t = _logits(
            teacher + row * vocabulary, columns, mask, bias, scale, softcap, HAS_BIAS, HAS_CAP
        )
        d -= on_p * tl.exp(t - tl.load(teacher_lse + row))
    d = tl.where(columns == tl.load(labels + row), d - on_label, d) * weight
    if HAS_CAP:
        tanh = s / softcap
        d = tl.where(mask, d * (1.0 - tanh * tanh), 0.0)
    tl.store(out + slot * vocabulary + columns, d.to(out.dtype.element_ty), mask=mask)


def softmax_epilogue_triton_(chunk: Chunk) -> RowStats:
    """Compute softmax_epilogue_ in two launches for any number of passes."""
    student_KnV, teacher_nV, head = chunk.student_KnV, chunk.teacher_nV, chunk.head
    num_passes, num_rows, vocabulary = student_KnV.shape
    per_row = student_KnV.new_zeros(4, num_passes, num_rows)
    lse_Kn, label_logit_Kn, kl_Kn = per_row[0], per_row[1], per_row[2]
    teacher_lse_n = per_row[3, 0]
    labels_n = chunk.labels_n
    top1 = torch.empty(num_passes + 1, num_rows, dtype=torch.int64, device=labels_n.device)
    # A pointer that no branch reads must still be a tensor of the right type.
    teacher = student_KnV if teacher_nV is None else teacher_nV
    bias = student_KnV if head.bias_V is None else head.bias_V
    shape = (num_rows, vocabulary, head.scale, head.softcap or 1.0)
    branches: dict[str, Any] = dict(
        HAS_TEACHER=teacher_nV is not None,
        HAS_BIAS=head.bias_V is not None,
        HAS_CAP=head.softcap is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=NUM_WARPS,
    )
    with torch.cuda.device_of(student_KnV):  # Triton launches on the current device
        _row_statistics[(num_rows, num_passes)](
            student_KnV, teacher, labels_n, bias, lse_Kn, teacher_lse_n, label_logit_Kn, kl_Kn,
            top1, top1[num_passes], *shape, IGNORE, **branches,
        )  # fmt: skip
        if chunk.needs_grad:
            blocks = triton.cdiv(vocabulary, branches["BLOCK"])
            on_device = _on_device(tuple(chunk.coefficients), student_KnV.device, student_KnV.dtype)
            _write_dlogits[(num_rows, num_passes, blocks)](
                student_KnV, teacher, chunk.dlogits_mV, labels_n, chunk.row_weights_n, on_device,
                bias, lse_Kn, teacher_lse_n, *shape, **branches,
            )  # fmt: skip
    teacher_top1_n = None if teacher_nV is None else top1[num_passes]
    return RowStats(lse_Kn, label_logit_Kn, kl_Kn, top1[:num_passes], teacher_top1_n)


@lru_cache(maxsize=64)
def _on_device(
    coefficients: tuple[Coefficients, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Copy the coefficients once: a copy at every chunk would make the host wait for the stream."""
    return torch.tensor(coefficients, dtype=dtype, device=device)
