"""Decides which steps are logged and writes the lines of metrics.jsonl and ledger.jsonl."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.recipe.config import LogConfig


class JsonlLog:
    """One JSON object per line, written by the main rank only, flushed at once."""

    def __init__(self, path: Path):
        self.path = path
        if dist.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)

    def keep_steps_before(self, step: int) -> None:
        """Drop lines of steps that will be run again after a resume."""
        if dist.is_main() and self.path.is_file():
            text = self.path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
            kept = [line for line in whole.splitlines() if json.loads(line)["step"] < step]
            self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        if dist.is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


class Schedule:
    """The steps, counted from 0, on which something is measured; the last step has everything."""

    def __init__(self, log: LogConfig, num_steps: int):
        self.log, self.num_steps = log, num_steps

    def is_probed(self, step: int) -> bool:
        return _is_due(self.log.probes_every, step)

    def is_validated(self, step: int) -> bool:
        return self._is_last(step) or _is_due(self.log.validate_every, step)

    def is_answered(self, step: int) -> bool:
        return self._is_last(step) or _is_due(self.log.evaluate_every, step)

    def is_logged(self, step: int) -> bool:
        every = (self.log.every, self.log.probes_every, self.log.validate_every)
        every += (self.log.evaluate_every,)
        return self._is_last(step) or any(_is_due(steps, step) for steps in every)

    def _is_last(self, step: int) -> bool:
        return step + 1 == self.num_steps


def _is_due(every: int, step: int) -> bool:
    return bool(every) and (step + 1) % every == 0


class Warnings:
    """Prints each sign of a run that does not distil once in a stage, on the main rank."""

    def __init__(self, stage: str):
        self.stage = stage
        self._said: set[str] = set()

    def say(self, warnings: dict[str, str]) -> None:
        if dist.is_main():
            for name in warnings.keys() - self._said:
                print(f"{self.stage}: warning: {warnings[name]}", file=sys.stderr, flush=True)
        self._said |= warnings.keys()


def token_counts(micro: Sequence[PairBatch]) -> dict[str, int]:
    """Count a step's tokens and samples over all ranks; `answer`: the student's. A collective."""
    teachers = [batch.teacher for batch in micro if batch.teacher]
    counts = torch.tensor(
        [
            sum(int(b.student.inputs.attention_mask.sum()) for b in micro),
            sum(int(teacher.inputs.attention_mask.sum()) for teacher in teachers),
            sum(len(teacher.layout.source_P) for teacher in teachers),
            sum(b.num_student_rows for b in micro),
            sum(b.num_samples for b in micro),
        ],
        dtype=torch.float64,
    )
    values = dist.sum_over_ranks(counts.to(dist.device())).long().tolist()
    return dict(zip(("student", "teacher", "packed", "answer", "samples"), values, strict=True))


def rates(tokens: dict[str, int], phases: dict[str, float], seconds: float) -> dict[str, float]:
    """Compute tokens per second over all ranks, in each phase's own time and overall."""
    of_phase = {"teacher": "teacher", "student": "student", "recalibrator": "packed"}
    per_second = {
        phase: tokens[kind] / phases[phase] for phase, kind in of_phase.items() if phases.get(phase)
    }
    per_second["step"] = (tokens["student"] + tokens["teacher"]) / seconds
    return {name: round(rate, 1) for name, rate in per_second.items()}


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out what a skipped step could not measure: JSON has no NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
