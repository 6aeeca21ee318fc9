"""Computes any distance of the STUDENT's distributions to a target, by its head, in row chunks.

Shapes: M rows, D student width, V student vocabulary, n rows of a chunk.

A sum by bytes, a sort or a transport plan has no closed form for its gradient. Autograd
differentiates the distance down to a chunk's logits; this file adds up the head's own gradients.
The weight is ONE input for any number of chunks, the forward forms all gradients, and only one
chunk's logits exist at once: linear_cross_entropy.py does the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genrecal_ds.ops.checks import expect
from genrecal_ds.ops.gemm import add_product_, project_, rows_per_chunk, scaled, wide
from genrecal_ds.ops.head_loss.chunked import CHUNK_BYTES, CHUNK_MULTIPLE
from genrecal_ds.ops.head_loss.contract import Head
from genrecal_ds.ops.softcap import softcapped

ChunkDistance = Callable[[Tensor, slice], Tensor]  # (logits [n, V], their rows) -> [n]
# Matrices of a chunk's logits' size that a distance may hold where its caller names no number.
MATRICES = 16


def linear_distance(
    rows_MD: Tensor,
    head: Head,
    distance: ChunkDistance,
    sizes: Sequence[int] | None = None,
    teacher_vocabulary: int = 0,
    matrices: int = MATRICES,
) -> tuple[Tensor, Tensor]:
    """Return (sum of the distances, the distances [M] detached), fp32 (fp64 for fp64 rows).

    rows_MD: the head's dtype. The distance gets fp32 logits with the head's transform; anything
    else that the distance reads is a constant. sizes: rows of each chunk, for rows that have to
    stay together; default: as many as the byte budget allows if the distance holds `matrices` of
    the larger vocabulary, logits and their gradient among them. Rows, weight and bias each get a
    gradient only if they require one, zeros where no distance depends on them.
    Raises ValueError naming the argument that does not fit.
    """
    rows, width = rows_MD.shape
    expect("head.weight_VH", head.weight_VH, (head.weight_VH.shape[0], width), rows_MD)
    expect("rows_MD", rows_MD, (rows, width), head.weight_VH)
    if head.bias_V is not None:
        expect("head.bias_V", head.bias_V, (head.weight_VH.shape[0],), rows_MD)
    if sizes is None:
        sizes = _sizes(rows, head.weight_VH, teacher_vocabulary, matrices)
    elif sum(sizes) != rows:
        raise ValueError(f"sizes: {sum(sizes)} rows in all, expected {rows}")
    return _LinearDistance.apply(
        rows_MD, head.weight_VH, head.bias_V, head, distance, sizes, torch.is_grad_enabled()
    )


class _LinearDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MD, weight_VD, bias_V, head, distance, sizes, has_grad):
        # `head` gives scale and softcap; autograd knows its tensors only as the other inputs.
        head = head._replace(weight_VH=weight_VD, bias_V=bias_V)
        # needs_input_grad ignores no_grad, and inside a Function gradients are always off.
        wants = [has_grad and needed for needed in ctx.needs_input_grad[:3]]
        fp, vocabulary = wide(weight_VD), weight_VD.shape[0]
        distance_M = rows_MD.new_zeros(len(rows_MD), dtype=fp)
        d_rows = torch.zeros_like(rows_MD) if wants[0] else None
        d_weight = torch.zeros_like(weight_VD, dtype=fp) if wants[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=fp) if wants[2] else None
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            start += size
            rows = rows_MD[part]
            products_nV = weight_VD.new_empty(size, vocabulary, dtype=fp)
            project_(products_nV, rows, weight_VD)
            distance_M[part], d_nV = _of_chunk(products_nV, head, distance, part, any(wants))
            if d_nV is None:
                continue
            low_nV = d_nV.to(weight_VD.dtype)
            if d_rows is not None:
                d_rows[part] = torch.mm(low_nV, weight_VD)
            if d_weight is not None:
                add_product_(d_weight, low_nV, rows)
            if d_bias is not None:
                d_bias += d_nV.sum(0)
            del products_nV, d_nV, low_nV  # before the next chunk's
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.mark_non_differentiable(distance_M)
        return distance_M.sum(), distance_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, _):
        gradients = [
            None if gradient is None else scaled(gradient, grad_sum, ctx.weight_dtype)
            for gradient in ctx.saved_tensors
        ]
        return *gradients, None, None, None, None


def _of_chunk(
    products_nV: Tensor, head: Head, distance: ChunkDistance, part: slice, has_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (distances [n], gradient of their sum at the products [n, V], or None)."""
    with torch.set_grad_enabled(has_grad):
        leaf_nV = products_nV.requires_grad_(has_grad)
        logits_nV = leaf_nV if head.bias_V is None else leaf_nV + head.bias_V.detach()
        if head.scale != 1.0:
            logits_nV = logits_nV * head.scale
        logits_nV = softcapped(logits_nV, head.softcap)
        distance_n = distance(logits_nV, part)
        if not distance_n.requires_grad:
            return distance_n, None
        (d_nV,) = torch.autograd.grad(distance_n.sum(), leaf_nV)
    return distance_n.detach(), d_nV


def _sizes(rows: int, weight_VD: Tensor, teacher_vocabulary: int, matrices: int) -> list[int]:
    kind = "cuda" if weight_VD.is_cuda else "cpu"
    columns = max(weight_VD.shape[0], teacher_vocabulary)
    bytes_per_row = matrices * columns * wide(weight_VD).itemsize
    most = rows_per_chunk(rows, bytes_per_row, CHUNK_BYTES[kind], CHUNK_MULTIPLE[kind])
    return [min(most, rows - start) for start in range(0, rows, most)]
