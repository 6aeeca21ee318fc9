"""Computes CE(head_s(z_s), gt_s) alone: pretrain, sft and the controls without a teacher."""

from genrecal_ds.objectives.base import Ingredients, Objective


class Supervised(Objective):
    """Nothing beyond the skeleton: without a teacher only the student's term is left."""


def build(parts: Ingredients) -> Supervised:
    return Supervised(parts)
