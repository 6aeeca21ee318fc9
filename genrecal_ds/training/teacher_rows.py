"""Computes the teacher's rows of a step's micro-batches, in one forward each or for several.

Shapes: A teacher rows entering the Recalibrator, N teacher loss rows, H teacher width.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from genrecal_ds.data.batch import PairBatch, SideBatch, join_teacher, to_device
from genrecal_ds.objectives.base import TeacherRows
from genrecal_ds.objectives.report import Clock


class RunsTeacher(Protocol):
    """A teacher engine, a replica, or the rows of a cache in their place."""

    def __call__(
        self, inputs: SideBatch, rows_A: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def teacher_rows(teacher: RunsTeacher | None, batch: PairBatch, clock: Clock) -> TeacherRows | None:
    """The rows of one micro-batch that is on the device; None in a stage without a teacher."""
    if teacher is None or batch.teacher is None:
        return None
    view = batch.teacher
    with clock.phase("teacher"):
        return TeacherRows(*teacher(view.inputs, view.rows_A, view.targets_N))


def with_teacher_rows(
    micro: list[PairBatch],
    teacher: RunsTeacher | None,
    forward_batches: int,
    rules: dict[str, str],
    clock: Clock,
    device: torch.device,
) -> Iterator[tuple[PairBatch, TeacherRows | None]]:
    """The micro-batches on the device, each with its rows; forward_batches of them come from one
    forward. rules: the teacher's vision rules.

    A micro-batch is on the device no longer than needed: a step's pictures are gigabytes.
    """
    if teacher is None or forward_batches == 1:
        for batch in micro:
            batch = to_device(batch, device)
            yield batch, teacher_rows(teacher, batch, clock)
        return
    for first in range(0, len(micro), forward_batches):
        batches = [to_device(batch, device) for batch in micro[first : first + forward_batches]]
        with clock.phase("teacher"):
            joined = join_teacher(batches, rules)
            inputs_AH, targets_NH = teacher(*joined[:3])
        rows = inputs_AH.split([rows for rows, _ in joined.sizes])
        targets = targets_NH.split([targets for _, targets in joined.sizes])
        yield from zip(batches, map(TeacherRows, rows, targets), strict=True)
