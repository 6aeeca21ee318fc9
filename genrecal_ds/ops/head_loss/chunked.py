"""Runs head_loss chunk by chunk: cuBLAS GEMMs, one epilogue, the rows' gradient on the way.

Shapes: K passes, N loss rows, n rows of a chunk, H teacher width, V vocabulary.

The head is frozen, so d loss / d rows needs the logits once and no backward of its own: nothing
of size [N, V] outlives its chunk, and backward is a multiplication. GEMMs of 2 n V H FLOP:

    one pass                 logits(r), logits(z), dlogits @ W        3
    stage 1, two passes      logits(r1, r2, z), dlogits1, 2 @ W       5, not 2 x 3

Rows that meet the same weight are stacked into one GEMM, so W is streamed twice a chunk.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genrecal_ds import IGNORE
from genrecal_ds.ops.gemm import project_, rows_per_chunk, wide
from genrecal_ds.ops.head_loss.contract import Head
from genrecal_ds.ops.head_loss.epilogue import Chunk, Coefficients, RowStats, softmax_epilogue_

# Budget of one chunk's logits and dlogits. Smaller chunks cost GEMM speed (docs/performance.md).
CHUNK_BYTES = {"cuda": 1_600_000_000, "cpu": 96 << 20}
CHUNK_MULTIPLE = {"cuda": 128, "cpu": 16}

Epilogue = Callable[[Chunk], RowStats]


class Buffers(NamedTuple):
    """Memory of a chunk, allocated once a call."""

    logits: Tensor  # [(K + 1) n, V] fp32: the passes' and the teacher's
    dlogits: Tensor | None  # [K n, V] in a low-precision head's dtype; None: in place


def epilogue_of(implementation: str) -> Epilogue:
    """Return the epilogue of `torch` or `triton`."""
    if implementation == "triton":
        from genrecal_ds.ops.head_loss.kernels import softmax_epilogue_triton_

        return softmax_epilogue_triton_
    return softmax_epilogue_


def chunk_size(num_rows: int, num_passes: int, has_teacher: bool, weight_VH: Tensor) -> int:
    """Return the rows of one chunk, from the byte budget of the weight's device.

    has_teacher: the teacher's logits lie beside those of the passes.
    """
    kind, fp = "cuda" if weight_VH.is_cuda else "cpu", wide(weight_VH)
    low = num_passes * weight_VH.element_size() * (weight_VH.dtype != fp)
    bytes_per_row = weight_VH.shape[0] * ((num_passes + has_teacher) * fp.itemsize + low)
    return rows_per_chunk(num_rows, bytes_per_row, CHUNK_BYTES[kind], CHUNK_MULTIPLE[kind])


def head_loss_forward(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    head: Head,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
    epilogue: Epilogue,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss_sum, ce_KN, kl_KN, top1_KN, grad_KNH or empty); see head_loss."""
    num_passes, num_rows, _ = rows_KNH.shape
    fp = wide(head.weight_VH)
    size = chunk_size(num_rows, num_passes, True, head.weight_VH)
    buffers = _allocate(min(size, num_rows), num_passes, head.weight_VH, needs_grad)
    row_weights_N = (labels_N != IGNORE).to(fp)
    coefficients = [
        Coefficients(on_q=a + b, on_p=b, on_label=a)
        for a, b in zip(ce_weights, kl_weights, strict=True)
    ]
    ce_KN = rows_KNH.new_zeros(num_passes, num_rows, dtype=fp)
    kl_KN, top1_KN = torch.zeros_like(ce_KN), torch.zeros_like(ce_KN, dtype=torch.bool)
    grad_KNH = torch.empty_like(rows_KNH) if needs_grad else rows_KNH.new_empty(0)
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        rows_KnH = rows_KNH[:, part]
        student_KnV, teacher_nV, dlogits_mV = _logits(
            rows_KnH, teacher_rows_NH[part], head.weight_VH, buffers
        )
        chunk = Chunk(
            student_KnV, teacher_nV, labels_N[part], row_weights_N[part],
            coefficients, head, needs_grad, dlogits_mV,
        )  # fmt: skip
        stats = epilogue(chunk)
        ce_KN[:, part] = stats.lse_Kn - stats.label_logit_Kn
        kl_KN[:, part] = stats.kl_Kn
        top1_KN[:, part] = stats.top1_Kn == stats.teacher_top1_n
        if needs_grad:
            grad_KNH[:, part] = torch.mm(dlogits_mV, head.weight_VH).view(rows_KnH.shape)
    valid_N = row_weights_N != 0
    sums = _sum_up(ce_KN, kl_KN, valid_N, ce_weights, kl_weights)
    return *sums, top1_KN & valid_N, grad_KNH


def _sum_up(
    ce_KN: Tensor,
    kl_KN: Tensor,
    valid_N: Tensor,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss_sum, CE, KL). A term with weight 0 and a row without a label both read 0.

    The weights stay Python numbers: copying them to the device would make the host wait.
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


def _allocate(num_rows: int, num_passes: int, weight_VH: Tensor, needs_grad: bool) -> Buffers:
    fp, vocabulary = wide(weight_VH), weight_VH.shape[0]
    logits = weight_VH.new_empty((num_rows * (num_passes + 1), vocabulary), dtype=fp)
    if weight_VH.dtype == fp or not needs_grad:
        return Buffers(logits, None)
    return Buffers(logits, weight_VH.new_empty((num_rows * num_passes, vocabulary)))


def _logits(
    rows_KnH: Tensor, teacher_rows_nH: Tensor, weight_VH: Tensor, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (student's logits [K, n, V], teacher's [n, V], place for dlogits) by one GEMM."""
    num_passes, num_rows, _ = rows_KnH.shape
    rows_mH = torch.cat([*rows_KnH, teacher_rows_nH])
    out_mV = buffers.logits[: len(rows_mH)]
    project_(out_mV, rows_mH, weight_VH)
    student_mV = out_mV[: num_passes * num_rows]
    dlogits_mV = student_mV if buffers.dlogits is None else buffers.dlogits[: len(student_mV)]
    teacher_nV = out_mV[num_passes * num_rows :]
    return student_mV.unflatten(0, (num_passes, num_rows)), teacher_nV, dlogits_mV
