"""What is minimised. One module per objective; the trainer knows only this interface.

An objective is an nn.Module with
    forward(batch, teacher_rows, totals, probe) -> (loss, Report)
where loss is already divided by the whole step's totals (token-exact mean). Where there are
several teachers, teacher_rows is a tuple of theirs (several_teachers.py).
"""

from typing import NamedTuple

from torch import Tensor


class Totals(NamedTuple):
    """Rows of the WHOLE optimizer step, over all ranks and micro-batches; at least 1."""

    teacher_rows: float
    student_rows: float
    more_rows: tuple[float, ...] = ()  # as teacher_rows, of further teachers

    def seen_by(self, teacher: int) -> "Totals":
        """Those of this teacher; 0 is the first."""
        return self._replace(teacher_rows=self.more_rows[teacher - 1]) if teacher else self


class TeacherRows(NamedTuple):
    """The teacher's hidden states that a micro-batch needs, frozen."""

    inputs_AH: Tensor  # rows that enter the Recalibrator
    targets_NH: Tensor  # z: the teacher's own rows that predict the labels
