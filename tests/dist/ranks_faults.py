"""Run on every rank: a stage with faults put in by hand.

    ranks_faults.py nan RECIPE OUT        rank 1's loss is NaN in steps 3 and 5: both skipped
    ranks_faults.py nan_forever RECIPE OUT
    ranks_faults.py mismatch RECIPE OUT   rank 1 would leave its vision tower out
    ranks_faults.py mixed RECIPE OUT      200 steps of random samples, different on every rank

OUT gets one json per rank.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import to_device
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.recipe_file import load_recipe
from genrecal_ds.training import engine
from genrecal_ds.training.build import build_stage
from genrecal_ds.training.guards.agreement import CallMismatch
from genrecal_ds.training.inputs import open_inputs
from genrecal_ds.training.trainer import Trainer


class Faulty:
    """A student engine whose loss is NaN on rank 1 in some steps; everything else is its own."""

    def __init__(self, student: engine.StudentEngine, bad_steps: range | list[int]):
        self._student, self._bad_steps = student, bad_steps
        self.step_number = 0

    def __call__(self, *inputs: Any) -> Any:
        loss, report = self._student(*inputs)
        is_bad = dist.rank() == 1 and self.step_number in self._bad_steps
        return (loss * float("nan") if is_bad else loss), report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)

    def digest(self) -> str:
        """Of this rank's share of weights and optimizer state."""
        result = hashlib.sha256()
        optimizer = self._student._engine.optimizer
        for flat in optimizer.fp32_partitioned_groups_flat:
            result.update(flat.detach().numpy().tobytes())
            for value in optimizer.optimizer.state[flat].values():
                result.update(torch.as_tensor(value).float().numpy().tobytes())
        return result.hexdigest()


def with_nan(recipe: Recipe, trainer: Trainer, bad_steps: range | list[int]) -> dict[str, Any]:
    student = trainer.parts.student = Faulty(trainer.parts.student, bad_steps)
    digests = []
    train_step = trainer.train_step

    def watched(step: int, micro: list) -> Any:
        student.step_number = step
        try:
            return train_step(step, micro)
        finally:
            digests.append(student.digest())

    trainer.train_step = watched
    try:
        trainer.run()
        error = None
    except UserError as raised:
        error = str(raised)
    return {"digests": digests, "error": error, "skipped": trainer.faults.skipped}


def mismatched(trainer: Trainer) -> dict[str, Any]:
    micro = [to_device(trainer.parts.dataset[(dist.rank(),)], trainer.device)]
    if dist.rank() == 1:
        side = micro[0].student
        side = side._replace(inputs=side.inputs._replace(vision={}))
        micro = [micro[0]._replace(student=side)]
    try:
        trainer.train_step(0, micro)
    except CallMismatch as raised:
        return {"error": str(raised)}
    return {"error": None}


def mixed(trainer: Trainer, num_steps: int) -> dict[str, Any]:
    """Each rank draws samples of its own, of any class and number, each micro-batch."""
    random = np.random.default_rng(dist.rank())
    classes = trainer.parts.dataset.reader.index.classes
    by_class = [np.flatnonzero(classes == name) for name in np.unique(classes)]
    seen: set[int] = set()
    for step in range(num_steps):
        members = by_class[random.integers(len(by_class))]
        slots = tuple(int(slot) for slot in random.choice(members, random.integers(0, 3)))
        seen.update(int(classes[slot]) for slot in slots)
        micro = [to_device(trainer.parts.dataset[slots], trainer.device)]
        loss = trainer.train_step(step % trainer.num_steps, micro).reduce()["loss"]
    return {"loss": loss, "classes": sorted(seen)}


def main(scenario: str, recipe_path: str, out: str) -> None:
    recipe = load_recipe(recipe_path)
    inputs = open_inputs(recipe)
    engine.start()
    stage = recipe.stages[0]
    parts = build_stage(recipe, stage, inputs, recipe.student.path, None)
    trainer = Trainer(recipe, stage, parts, {})
    if scenario == "nan":
        result = with_nan(recipe, trainer, [2, 4])
    elif scenario == "nan_forever":
        result = with_nan(recipe, trainer, range(2, 100))
    elif scenario == "mismatch":
        result = mismatched(trainer)
    else:
        result = mixed(trainer, 200)
    Path(out, f"rank{dist.rank()}.json").write_text(json.dumps(result))
    dist.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
