"""A grid: arms, each a recipe with changed keys, times seeds. A YAML file becomes a list of runs.

    shards: runs/demo/data/heldout        # what the last stage's student is scored on
    seeds: [1, 2, 3]
    overrides: [precision=fp32]           # of every arm
    arms:
      GenRecal: {}
      no L_ar: {overrides: [stages.align.losses.ar=0, stages.distill.losses.ar=0]}
      SFT: {recipe: launch/recipes/demo/sft_only.yaml}
    tables:                               # default: one of all arms
      Terms: [GenRecal, no L_ar]          # differences are to the first arm of a table

A seed decides the Recalibrator's first weights and every stage's order of samples. Stages are
counted from the end, so that the last stages of two arms see the same samples in the same order:
arms are compared seed by seed.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from genrecal_ds.config import Section, check_folders, load_recipe, tree_error
from genrecal_ds.errors import UserError

ORDERS = 1000  # seeds of stages are this far apart from one seed of the grid to the next


class Arm(Section):
    recipe: Path | None = None  # default: the command's
    overrides: tuple[str, ...] = ()


class Grid(Section):
    shards: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    max_new_tokens: int = Field(32, gt=0)
    limit: int | None = Field(None, gt=0)  # only the first samples of the shards
    overrides: tuple[str, ...] = ()
    arms: dict[str, Arm] = Field(min_length=1)
    tables: dict[str, tuple[str, ...]] = {}

    @model_validator(mode="after")
    def _names_fit(self) -> "Grid":
        for title, arms in self.tables.items():
            if unknown := [arm for arm in arms if arm not in self.arms]:
                raise ValueError(f"tables.{title}: no arm {unknown[0]!r}")
        names = [folder_name(arm) for arm in self.arms]
        if same := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"arms: two of them would share the folder {sorted(same)[0]}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands there twice")
        return self


class Run(NamedTuple):
    arm: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]
    folder: Path
    student: Path  # what is scored
    facts: dict[str, Any]  # the resolved recipe; another one in the folder is refused

    @property
    def score(self) -> Path:
        return self.folder / "score.json"


def load_grid(path: Path) -> Grid:
    """Raises UserError, in one line that names the key."""
    if not path.is_file():
        raise UserError(f"{path}: no such grid file")
    try:
        tree = yaml.safe_load(path.read_text())
        return Grid.model_validate(tree)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {tree_error(error, Grid)}") from None


def runs_of(grid: Grid, recipe: Path, out: Path) -> list[Run]:
    """All runs, seed by seed: what is cut short has every arm.

    Raises UserError for any arm's recipe that cannot run, before the first one trains.
    """
    if not (grid.shards / "manifest.json").is_file():
        raise UserError(f"shards: {grid.shards} has no manifest.json; build it: data_tools.build")
    return [
        _run(arm, grid, seed, grid.arms[arm].recipe or recipe, out)
        for seed in grid.seeds
        for arm in grid.arms
    ]


def claim(run: Run) -> None:
    """Make the run's folder, or refuse one that holds another recipe's results."""
    path = run.folder / "arm.json"
    if path.is_file():
        found = json.loads(path.read_text())
        for key, value in run.facts.items():
            if found.get(key) != value:
                raise UserError(
                    f"{run.folder}: holds results of another {key}; remove it, or name another "
                    "--out"
                )
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run.facts, indent=2) + "\n")


def folder_name(arm: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")


def _run(arm: str, grid: Grid, seed: int, recipe: Path, out: Path) -> Run:
    folder = out / folder_name(arm) / f"seed-{seed}"
    chosen = [*grid.overrides, *grid.arms[arm].overrides]
    names = [stage.name for stage in _loaded(arm, recipe, chosen).stages]
    seeds = [f"stages.{i}.seed={s}" for i, s in enumerate(stage_seeds(seed, len(names)))]
    overrides = (*chosen, f"run_dir={folder}", f"seed={seed}", *seeds)
    resolved = _loaded(arm, recipe, overrides)
    check_folders(resolved)
    facts = resolved.model_dump(mode="json", exclude={"run_dir"})
    facts |= {"shards": str(grid.shards), "limit": grid.limit, "tokens": grid.max_new_tokens}
    return Run(arm, seed, recipe, overrides, folder, folder / names[-1] / "student", facts)


def stage_seeds(seed: int, num_stages: int) -> list[int]:
    """The last stage's is the same however many stand before it."""
    return [seed * ORDERS + num_stages - 1 - position for position in range(num_stages)]


def _loaded(arm: str, recipe: Path, overrides: Sequence[str]):
    try:
        return load_recipe(recipe, overrides)
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None
