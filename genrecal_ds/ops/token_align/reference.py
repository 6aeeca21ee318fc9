"""The definition of token_align, in plain torch.

Shapes: B batch, S student length, D student width, H teacher width, A teacher rows used,
P packed rows.
"""

from torch import Tensor, cat
from torch.nn.functional import linear


def token_align_reference(
    student_hidden_BSD: Tensor,
    teacher_rows_AH: Tensor,
    proj_pre_weight_DH: Tensor,
    source_P: Tensor,
) -> Tensor:
    """Project the teacher's rows (Proj-pre) and gather both sides into the packed sequences.

    source_P (int32): i >= 0 takes row i of student_hidden [B*S], i < 0 teacher row -i-1.
    Returns packed_PD in the student's dtype. Gradients flow to the student's rows and to the
    weight, never to the teacher's rows (frozen). All teacher rows are projected once, also when
    the mixed and the regular sequence share them: dW sums over both uses.
    Source: paper section 3.2, `[z_qs ; Proj-pre(z_al)]` and `[Proj-pre(z_ql) ; Proj-pre(z_al)]`.
    """
    projected_AD = linear(teacher_rows_AH.detach().to(proj_pre_weight_DH.dtype), proj_pre_weight_DH)
    student_rows = student_hidden_BSD.flatten(0, 1)
    num_student_rows = student_rows.shape[0]
    source = source_P.long()
    row = source.where(source >= 0, num_student_rows - 1 - source)
    return cat([student_rows, projected_AD.to(student_rows.dtype)]).index_select(0, row)
