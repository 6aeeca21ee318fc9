"""Multiplies low-precision matrices and keeps the products in fp32, on CUDA and on the CPU.

Shapes: n rows, H width, V vocabulary.

A bf16 logits buffer costs 3 to 5 % of relative gradient error where logits are peaked; fp32
logits with bf16 dlogits cost 0.2 % (docs/performance.md).
"""

import torch
from torch import Tensor

CPU_COLUMN_BLOCK = 4096  # columns of a low-precision head converted to fp32 at a time


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype that products of this tensor are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def project_(out_nV: Tensor, rows_nH: Tensor, weight_VH: Tensor) -> None:
    """Compute out = rows @ weight.T, accumulated and kept in out's dtype."""
    if rows_nH.dtype == out_nV.dtype:
        torch.mm(rows_nH, weight_VH.t(), out=out_nV)
    elif rows_nH.is_cuda:
        torch.mm(rows_nH, weight_VH.t(), out_dtype=out_nV.dtype, out=out_nV)
    else:  # the CPU's mm has no out_dtype
        rows = rows_nH.to(out_nV.dtype)
        for start in range(0, weight_VH.shape[0], CPU_COLUMN_BLOCK):
            columns = slice(start, start + CPU_COLUMN_BLOCK)
            out_nV[:, columns] = rows @ weight_VH[columns].to(out_nV.dtype).t()


def add_product_(sum_VH: Tensor, left_nV: Tensor, right_nH: Tensor) -> None:
    """Add left.T @ right in the dtype of sum: a bf16 sum of many chunks loses small chunks."""
    if left_nV.dtype == sum_VH.dtype:
        torch.addmm(sum_VH, left_nV.t(), right_nH, out=sum_VH)
    elif left_nV.is_cuda:
        torch.addmm(sum_VH, left_nV.t(), right_nH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        sum_VH.add_(left_nV.t() @ right_nH)


def scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sums * factor, rounded once to dtype.

    A GPU makes no second copy in the dtype of the sums. The sums of a head are [V, D] in fp32.
    """
    return torch.mul(sums, factor, out=sums.new_empty(sums.shape, dtype=dtype))


def rows_per_chunk(num_rows: int, bytes_per_row: int, budget: int, multiple: int) -> int:
    """Return the rows of one chunk: within the byte budget, balanced over the chunks.

    The result is never below `multiple` (128 on CUDA, 16 on the CPU), even for a small budget.
    """
    most = max(multiple, budget // bytes_per_row // multiple * multiple)
    if num_rows <= most:
        return max(1, num_rows)
    chunks = -(-num_rows // most)
    return -(-num_rows // (chunks * multiple)) * multiple
