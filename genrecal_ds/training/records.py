"""A logged step's line in metrics.jsonl: tokens, rates and what the report says."""

import math
from collections.abc import Sequence

import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch


def token_counts(micro: Sequence[PairBatch]) -> dict[str, int]:
    """Tokens and samples of a step over all ranks; `answer` are the student's. A collective."""
    teachers = [view.teacher for b in micro for view in (b, *b.more) if view.teacher]
    counts = torch.tensor(
        [
            sum(int(b.student.inputs.attention_mask.sum()) for b in micro),
            sum(int(teacher.inputs.attention_mask.sum()) for teacher in teachers),
            sum(len(teacher.packing.source_P) for teacher in teachers),
            sum(b.num_student_rows for b in micro),
            sum(b.num_samples for b in micro),
        ],
        dtype=torch.float64,
    )
    values = dist.sum_over_ranks(counts.to(dist.device())).long().tolist()
    return dict(zip(("student", "teacher", "packed", "answer", "samples"), values, strict=True))


def rates(tokens: dict[str, int], phases: dict[str, float], seconds: float) -> dict[str, float]:
    """Tokens per second over all ranks in each phase's own time, and overall."""
    of_phase = {"teacher": "teacher", "student": "student", "recalibrator": "packed"}
    found = {
        phase: tokens[kind] / phases[phase] for phase, kind in of_phase.items() if phases.get(phase)
    }
    found["step"] = (tokens["student"] + tokens["teacher"]) / seconds
    return {name: round(rate, 1) for name, rate in found.items()}


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """JSON has no NaN; what a skipped step could not measure is left out."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
