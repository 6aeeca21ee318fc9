"""Runs head_loss chunk by chunk: GEMMs, one epilogue, the rows' gradient formed on the way.

Shapes: K passes, N loss rows, n rows of a chunk, H teacher width, V vocabulary.

The head is frozen, so d loss / d rows needs the logits once and no backward of its own: nothing
of size [N, V] outlives its chunk, and backward is a multiplication. GEMMs of 2 n V H FLOP:

    one pass                 logits(r), logits(z), dlogits @ W        3
    stage 1, two passes      logits(r1, r2, z), dlogits1, 2 @ W       5, not 2 x 3
    a cached teacher         logits(r), dlogits @ W                   2

Rows that meet the same weight are stacked into one GEMM, so W is streamed twice a chunk.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from genrecal_ds.ops import IGNORE
from genrecal_ds.ops.checks import expect
from genrecal_ds.ops.gemm import mean_of_rows, project_, rows_per_chunk, weighted_rows, wide
from genrecal_ds.ops.head_loss.contract import (
    FORWARD_KL,
    CachedTeacher,
    Divergence,
    Head,
    check_linear,
)
from genrecal_ds.ops.head_loss.epilogue import (
    Chunk,
    Coefficients,
    RowStats,
    softmax_epilogue_,
    transform_,
)
from genrecal_ds.ops.head_loss.variants import variant_epilogue_

# Of one chunk's logits and dlogits. Smaller chunks cost GEMM speed (docs/performance.md).
CHUNK_BYTES = {"cuda": 1_600_000_000, "cpu": 96 << 20}
CHUNK_MULTIPLE = {"cuda": 128, "cpu": 16}

Epilogue = Callable[[Chunk], RowStats]


class Buffers(NamedTuple):
    """The chunk's memory, allocated once a call."""

    logits: Tensor  # [(K + 1) n, V] fp32; [K n, V] beside a cached teacher
    dlogits: Tensor | None  # [K n, V] in a low-precision head's dtype; None: in place


def epilogue_of(
    implementation: str, divergence: Divergence = FORWARD_KL, temperature: float = 1.0
) -> Epilogue:
    """The epilogue of `torch`, `triton`, or of a `variant` of the loss."""
    if implementation == "variant":
        return partial(variant_epilogue_, divergence=divergence, temperature=temperature)
    if implementation == "triton":
        from genrecal_ds.ops.head_loss.kernels import softmax_epilogue_triton_

        return softmax_epilogue_triton_
    return softmax_epilogue_


def chunk_size(
    num_rows: int,
    num_passes: int,
    has_logits_of_teacher: bool,
    weight: Tensor,
    columns: int | None = None,
) -> int:
    """Rows of one chunk, from the byte budget of the weight's device; columns: default its own."""
    kind = "cuda" if weight.is_cuda else "cpu"
    matrices = num_passes + has_logits_of_teacher
    low = num_passes * weight.element_size() * (weight.dtype != wide(weight))
    bytes_per_row = (columns or weight.shape[0]) * (matrices * wide(weight).itemsize + low)
    return rows_per_chunk(num_rows, bytes_per_row, CHUNK_BYTES[kind], CHUNK_MULTIPLE[kind])


def head_loss_forward(
    rows_KNH: Tensor,
    teacher: Tensor | CachedTeacher,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
    epilogue: Epilogue,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum, ce_KN, kl_KN, top1_KN, grad_KNH or empty); see head_loss."""
    head = head.without_padding()
    num_passes, num_rows, _ = rows_KNH.shape
    cached = teacher if isinstance(teacher, CachedTeacher) else None
    teacher_rows_NH = None if isinstance(teacher, CachedTeacher) else teacher
    fp = wide(head.weight_VH)
    size = chunk_size(num_rows, num_passes, cached is None, head.weight_VH)
    buffers = _allocate(min(size, num_rows), num_passes, cached is None, head, needs_grad)
    row_weights_N = (labels_N != IGNORE).to(fp)
    coefficients = [
        Coefficients(a + b, 0.0 if cached else b, a)
        for a, b in zip(ce_weights, kl_weights, strict=True)
    ]
    ce_KN = rows_KNH.new_zeros(num_passes, num_rows, dtype=fp)
    kl_KN, top1_KN = torch.zeros_like(ce_KN), torch.zeros_like(ce_KN, dtype=torch.bool)
    grad_KNH = torch.empty_like(rows_KNH) if needs_grad else rows_KNH.new_empty(0)
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        rows_KnH = rows_KNH[:, part]
        z_nH = None if teacher_rows_NH is None else teacher_rows_NH[part]
        student_KnV, teacher_nV, dlogits_mV = _logits(rows_KnH, z_nH, head.weight_VH, buffers)
        chunk = Chunk(
            student_KnV, teacher_nV, labels_N[part], row_weights_N[part],
            coefficients, head, needs_grad, dlogits_mV,
        )  # fmt: skip
        stats = epilogue(chunk)
        ce_KN[:, part] = stats.lse_Kn - stats.label_logit_Kn
        if cached is None:
            kl_KN[:, part] = stats.kl_Kn
            top1_KN[:, part] = stats.top1_Kn == stats.teacher_top1_n
        else:
            kl_KN[:, part] = stats.lse_Kn - _mean_logit(rows_KnH, cached, part)
            top1_KN[:, part] = stats.top1_Kn == cached.top1_N[part]
        if needs_grad and cached is None:
            grad_KNH[:, part] = torch.mm(dlogits_mV, head.weight_VH).view(rows_KnH.shape)
        elif needs_grad and cached is not None:
            # Two large vectors that nearly cancel: b m is taken off before anything is rounded.
            sums_KnH = weighted_rows(dlogits_mV, head.weight_VH).view(rows_KnH.shape)
            mean_nH = cached.mean_head_NH[part] * row_weights_N[part, None]
            for k, b in enumerate(kl_weights):
                grad_KNH[k, part] = sums_KnH[k].sub_(mean_nH, alpha=b)
    valid_N = row_weights_N != 0
    sums = sum_up(ce_KN, kl_KN, valid_N, ce_weights, kl_weights)
    return *sums, top1_KN & valid_N, grad_KNH


def sum_up(
    ce_KN: Tensor,
    kl_KN: Tensor,
    valid_N: Tensor,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, CE, KL): a term with weight 0 reads 0, and so does every row without a label.

    The weights stay Python numbers: copied to the device they would make the host wait for it.
    """
    ce_KN, kl_KN = ce_KN.where(valid_N, 0), kl_KN.where(valid_N, 0)
    loss_sum = ce_KN.new_zeros(())
    for k, (a, b) in enumerate(zip(ce_weights, kl_weights, strict=True)):
        for losses_N, weight in ((ce_KN[k], a), (kl_KN[k], b)):
            if weight == 0:
                losses_N.zero_()
            else:
                loss_sum = loss_sum + weight * losses_N.sum()
    return loss_sum, ce_KN, kl_KN


@torch.no_grad()
def cache_teacher(
    teacher_rows_NH: Tensor, head: Head, dtype: torch.dtype = torch.float32
) -> CachedTeacher:
    """Everything of the teacher's distribution that CE + KL read. Two GEMMs, once (on CUDA with
    a bf16 head three, so that p is not rounded).

    teacher_rows_NH: of the head's dtype. dtype: of mean_head; bf16 halves it and adds the error
    that docs/performance.md bounds. Raises ValueError for a head with a softcap, and for rows
    that do not fit the head.
    """
    check_linear(head)
    width = head.weight_VH.shape[1]
    expect("teacher_rows_NH", teacher_rows_NH, (len(teacher_rows_NH), width), head.weight_VH)
    head = head.without_padding()
    weight, num_rows = head.weight_VH, teacher_rows_NH.shape[0]
    mean_head_NH = teacher_rows_NH.new_empty(teacher_rows_NH.shape, dtype=dtype)
    constant_N = teacher_rows_NH.new_empty(num_rows, dtype=wide(weight))
    top1_N = torch.empty(num_rows, dtype=torch.int64, device=teacher_rows_NH.device)
    size = chunk_size(num_rows, 1, True, weight)
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        logits_nV = teacher_rows_NH.new_empty(
            (len(teacher_rows_NH[part]), weight.shape[0]), dtype=constant_N.dtype
        )
        project_(logits_nV, teacher_rows_NH[part], weight)
        transform_(logits_nV, head, needs_slope=False)
        top1_N[part] = logits_nV.argmax(-1)
        log_p_nV = logits_nV.log_softmax(-1)
        p_nV = log_p_nV.exp()
        constant_N[part] = torch.linalg.vecdot(p_nV, log_p_nV)
        if head.bias_V is not None:
            constant_N[part] -= head.scale * (p_nV @ head.bias_V.to(p_nV.dtype))
        mean_head_NH[part] = mean_of_rows(p_nV, weight) * head.scale
    return CachedTeacher(mean_head_NH, constant_N, top1_N)


def _allocate(
    num_rows: int, num_passes: int, has_logits_of_teacher: bool, head: Head, needs_grad: bool
) -> Buffers:
    weight, vocabulary = head.weight_VH, head.weight_VH.shape[0]
    fp = wide(weight)
    logits = weight.new_empty(
        (num_rows * (num_passes + has_logits_of_teacher), vocabulary), dtype=fp
    )
    if weight.dtype == fp or not needs_grad:
        return Buffers(logits, None)
    return Buffers(logits, weight.new_empty((num_rows * num_passes, vocabulary)))


def _logits(
    rows_KnH: Tensor, teacher_rows_nH: Tensor | None, weight_VH: Tensor, buffers: Buffers
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(student's logits [K, n, V], teacher's [n, V], where dlogits [K n, V] belong): one GEMM."""
    num_passes, num_rows, _ = rows_KnH.shape
    stacked = [*rows_KnH] if teacher_rows_nH is None else [*rows_KnH, teacher_rows_nH]
    rows_mH = torch.cat(stacked) if len(stacked) > 1 else stacked[0]
    out_mV = buffers.logits[: len(rows_mH)]
    project_(out_mV, rows_mH, weight_VH)
    student_mV = out_mV[: num_passes * num_rows]
    dlogits_mV = student_mV if buffers.dlogits is None else buffers.dlogits[: len(student_mV)]
    teacher_nV = None if teacher_rows_nH is None else out_mV[num_passes * num_rows :]
    return student_mV.unflatten(0, (num_passes, num_rows)), teacher_nV, dlogits_mV


def _mean_logit(rows_KnH: Tensor, cached: CachedTeacher, part: slice) -> Tensor:
    """sum_v p_v s_v - sum_v p_v log p_v, per row, through m."""
    fp = cached.constant_N.dtype
    products_KnH = rows_KnH.to(fp) * cached.mean_head_NH[part].to(fp)
    return products_KnH.sum(-1) - cached.constant_N[part]
