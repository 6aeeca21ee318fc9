"""Trains by CE(head_s(z_s), gt_s) alone: kinds pretrain and sft, which have no teacher."""

from genrecal_ds.objectives.base import Ingredients, Objective


class Supervised(Objective):
    """The bare skeleton: without a teacher only the student's term is left."""


def build(parts: Ingredients) -> Supervised:
    return Supervised(parts)
