"""Runs token_align's gather and the transpose of that gather as Triton kernels.

Shapes: D student width, A teacher rows used, R source rows, U most uses of one row, P packed rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gather(student, projected, source, out, width, BLOCK: tl.constexpr):
    """Program (packed row, column block)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    index = tl.load(source + row).to(tl.int64)
    if index >= 0:
        value = tl.load(student + index * width + columns, mask=mask)
    else:
        value = tl.load(projected + (-index - 1) * width + columns, mask=mask)
    tl.store(out + row * width + columns, value, mask=mask)


@triton.jit
def _sum_uses(grad, uses, out, width, U: tl.constexpr, BLOCK: tl.constexpr):
    """Program (source row, column block): a sum in fp32, in the order of the packed rows."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for u in tl.static_range(U):
        use = tl.load(uses + row * U + u).to(tl.int64)
        used = columns < tl.where(use >= 0, width, 0)
        value = tl.load(grad + use * width + columns, mask=used, other=0.0)
        total += value.to(tl.float32)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=mask)


def gather(student_rows_RD: Tensor, projected_AD: Tensor, source_P: Tensor) -> Tensor:
    """Return packed_PD: row i of the student for source i >= 0, else projected row -i-1."""
    width = student_rows_RD.shape[1]
    packed_PD = student_rows_RD.new_empty(source_P.shape[0], width)
    if packed_PD.numel():
        with torch.cuda.device_of(packed_PD):  # Triton launches on the current device
            _gather[(len(packed_PD), triton.cdiv(width, BLOCK))](
                student_rows_RD, projected_AD, source_P, packed_PD, width, BLOCK=BLOCK
            )
    return packed_PD


def sum_uses_triton(grad_PD: Tensor, uses_RU: Tensor) -> Tensor:
    """Compute reference.sum_uses in one launch."""
    rows, uses = uses_RU.shape
    out_RD = grad_PD.new_empty(rows, grad_PD.shape[1])
    if out_RD.numel():
        with torch.cuda.device_of(out_RD):
            _sum_uses[(rows, triton.cdiv(grad_PD.shape[1], BLOCK))](
                grad_PD, uses_RU, out_RD, grad_PD.shape[1], U=uses, BLOCK=BLOCK
            )
    return out_RD
