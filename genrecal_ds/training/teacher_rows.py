"""Computes the teacher's rows of a step: one forward for each micro-batch, or one for several.

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
    """A teacher engine, a replica, or a cache of rows."""

    def __call__(
        self, inputs: SideBatch, rows_A: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def teacher_rows(teacher: RunsTeacher | None, batch: PairBatch, clock: Clock) -> TeacherRows | None:
    """Compute the rows of one micro-batch on the device; None in a stage without a teacher."""
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
    """Yield the micro-batches on the device, each with its rows. One forward serves
    forward_batches micro-batches. rules: the teacher's vision rules.

    A micro-batch stays on the device only while needed: a step's pictures are gigabytes.
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
