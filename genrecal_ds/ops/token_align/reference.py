"""Defines token_align in plain torch.

Shapes: B batch, S student length, D student width, H teacher width, A teacher rows used,
R source rows, U most uses of one row, P packed rows.
"""

import torch
from torch import Tensor, cat
from torch.nn.functional import linear


def token_align_reference(
    student_hidden_BSD: Tensor,
    teacher_rows_AH: Tensor,
    proj_pre_weight_DH: Tensor,
    source_P: Tensor,
) -> Tensor:
    """Return packed_PD; see token_align. Autograd's gradients of this are the definition too."""
    projected_AD = linear(teacher_rows_AH.detach(), proj_pre_weight_DH)
    student_rows = student_hidden_BSD.flatten(0, 1)
    source = source_P.long()
    row = source.where(source >= 0, student_rows.shape[0] - 1 - source)
    return cat([student_rows, projected_AD]).index_select(0, row)


def sum_uses(grad_PD: Tensor, uses_RU: Tensor) -> Tensor:
    """Sum in fp32 the gradients of all uses of each source row, 0 for no use: [R, D]."""
    padded = cat([grad_PD, grad_PD.new_zeros(1, grad_PD.shape[1])])
    used = uses_RU.long().where(uses_RU >= 0, grad_PD.shape[0])
    first, *others = used.unbind(1)
    total_RD = padded.index_select(0, first).to(torch.promote_types(grad_PD.dtype, torch.float32))
    for column in others:
        total_RD += padded.index_select(0, column)
    return total_RD.to(grad_PD.dtype)
