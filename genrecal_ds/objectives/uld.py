"""Distils by Universal Logit Distillation, any two tokenizers (Boizard, arXiv 2402.12030).

    D(s, t) = sum_i | sort(softmax t)_i - sort(softmax s)_i |

Both sides are sorted in falling order; the shorter side is padded with zeros. D is the cost of
moving one distribution onto the other when all tokens are equally far apart. The weight in
Boizard et al. is 1.5 (losses.kl).
"""

import torch.nn.functional as F
from torch import Tensor

from genrecal_ds.objectives.base import Ingredients
from genrecal_ds.objectives.student_kd import TokenKD


def build(parts: Ingredients) -> TokenKD:
    return TokenKD(parts, sorted_distance)


def sorted_distance(logits_nV: Tensor, teacher_nW: Tensor) -> Tensor:
    """Return D of each row, [n], 0 to 2."""
    student, teacher = (
        logits.softmax(-1).sort(-1, descending=True).values for logits in (logits_nV, teacher_nW)
    )
    longest = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(p, (0, longest - p.shape[-1])) for p in (student, teacher))
    return (teacher - student).abs().sum(-1)
