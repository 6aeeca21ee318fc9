"""Tells all ranks what they must know before a step's first forward, by one small all-reduce.

The numbers: row counts (the losses' denominators), what became of the samples, whether a rank asks
to stop, which samples the ranks really read, and which modules each rank is about to call.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch, SideBatch
from genrecal_ds.data.plan import PADDING

# Up to 4096 ranks a sum of squares is exact in float64. One code that differs then changes the
# comparison below by more than the rounding.
_SCHEDULE_BITS = 20


class Agreed(NamedTuple):
    """The numbers of a step that are the same on every rank."""

    teacher_rows: float
    student_rows: float
    sample_counts: list[float]
    stop: bool
    batch: int  # digest of the samples that the ranks read


class CallMismatch(RuntimeError):
    """Ranks are about to call different modules: under ZeRO-3 they would wait for ever."""


def agree(
    step: int, micro: Sequence[PairBatch], sample_counts: Sequence[int], wants_stop: bool
) -> Agreed:
    """Exchange this rank's numbers of one step. A collective.

    Raises CallMismatch on every rank, naming what each rank is about to call.
    """
    schedule = calls(micro)
    code = zlib.crc32(f"{step} {schedule}".encode()) >> (32 - _SCHEDULE_BITS)
    ids = [sample for batch in micro for sample in batch.sample_ids]
    numbers = [
        sum(batch.num_teacher_rows for batch in micro),
        sum(batch.num_student_rows for batch in micro),
        int(wants_stop),
        batch_digest(ids),
        code,
        code * code,
        *sample_counts,
    ]
    flat = dist.sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=dist.device()))
    teacher, student, stop, digest, codes, squares, *counts = flat.tolist()
    # Equal codes, and only those, make the mean of squares the square of the mean.
    if squares * dist.world_size() != codes * codes:
        raise CallMismatch(_differences(step, schedule))
    return Agreed(teacher, student, counts, stop > 0, int(digest))


def calls(micro: Sequence[PairBatch]) -> str:
    """Name the modules that a rank's micro-batches will call, as a readable line."""
    sides = (
        ">".join(_inputs(side.inputs) for side in (batch.teacher, batch.student) if side)
        for batch in micro
    )
    return f"{len(micro)} micro-batches: " + ", ".join(sides)


def _inputs(side: SideBatch) -> str:
    return "+".join(["text", *sorted(side.vision)])


def batch_digest(samples: Sequence[int]) -> int:
    """Add up a number below 2^31 for each sample: the order and the ranks do not matter.

    Exact as a float64 up to 4 million samples a step. Padding slots count nothing.
    """
    ids = np.array([sample for sample in samples if sample != PADDING], np.uint64)
    mixed = (ids + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return int((mixed >> np.uint64(33)).sum())


def _differences(step: int, schedule: str) -> str:
    """Say what the ranks are about to call, most common first; a collective."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(dist.gather_objects(schedule)):
        ranks_of.setdefault(text, []).append(rank)
    parts = [
        f"{_ranks(ranks)}: {text}"
        for text, ranks in sorted(ranks_of.items(), key=lambda item: -len(item[1]))
    ]
    return f"step {step}: ranks would call different modules: " + "; ".join(parts)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
