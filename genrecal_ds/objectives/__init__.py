"""What is minimised. One module per objective; the trainer knows only this interface.

An objective is an nn.Module with
    forward(batch, teacher_rows, totals, probe) -> (loss, Report)
where loss is already divided by the whole step's totals (token-exact mean).
"""

from typing import NamedTuple

from torch import Tensor


class Totals(NamedTuple):
    """Rows of the WHOLE optimizer step, over all ranks and micro-batches; at least 1."""

    teacher_rows: float
    student_rows: float


class TeacherRows(NamedTuple):
    """The teacher's hidden states that a micro-batch needs, frozen."""

    inputs_AH: Tensor  # rows that enter the Recalibrator
    targets_NH: Tensor  # z: the teacher's own rows that predict the labels
