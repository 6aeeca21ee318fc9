"""Reads a grid file and lists its runs: arms (recipes with changed keys), conditions, seeds.

    shards: runs/demo/data/heldout        # what the last stage's student is scored on
    seeds: [1, 2, 3]
    overrides: [precision=fp32]           # of every arm
    arms:
      GenRecal: {}
      no L_ar: {overrides: [stages.align.losses.ar=0, stages.distill.losses.ar=0]}
      SFT: {recipe: launch/recipes/demo/sft_only.yaml}
    tables:                               # default: one of all arms
      Terms: [GenRecal, no L_ar]          # differences are to the first arm of a table
    conditions:                           # default: none, and no folder or table of their own
      clean: {}
      35 % wrong labels: {overrides: [data.train=runs/demo/data/wrong]}  # after an arm's own
    measures:                             # each a table of its own, beside all questions' score
      with reasoning: [largest, row_sum, column_sum]  # kinds of questions; the mean over them
    controls: [SFT]                       # differences are to each of these arms instead

A seed decides the Recalibrator's first weights and every stage's order of samples. Stages are
counted from the end. So the last stages of two arms see the same samples in the same order, and
arms are compared seed by seed, within a condition.
"""

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.recipe_file import check_folders, load_recipe, tree_error
from genrecal_ds.recipe.stage_config import Section

ALL_ARMS, PROBES = "All arms", "Probes"  # tables that the grid does not name
ORDERS = 1000  # seeds of stages are this far apart from one seed of the grid to the next

Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Arm(Section):
    recipe: Path | None = None  # default: the command's
    overrides: tuple[str, ...] = ()


class Condition(Section):
    overrides: tuple[str, ...] = ()  # of every arm


class Grid(Section):
    shards: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    max_new_tokens: int = Field(32, gt=0)
    limit: int | None = Field(None, gt=0)  # only the first samples of the shards
    overrides: tuple[str, ...] = ()
    arms: dict[str, Arm] = Field(min_length=1)
    tables: dict[str, Names] = {}
    conditions: dict[str, Condition] = {}
    measures: dict[str, Names] = {}
    controls: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_fit(self) -> "Grid":
        tables = {f"tables.{title}": arms for title, arms in self.tables.items()}
        for key, arms in {**tables, "controls": self.controls}.items():
            if unknown := [arm for arm in arms if arm not in self.arms]:
                raise ValueError(f"{key}: no arm {unknown[0]!r}")
        for key, names in (("arms", self.arms), ("conditions", self.conditions)):
            if same := _repeated([folder_name(name) for name in names]):
                raise ValueError(f"{key}: two of them would share the folder {same[0]}")
        lists = {f"measures.{name}": kinds for name, kinds in self.measures.items()}
        for key, values in {"seeds": self.seeds, "controls": self.controls, **lists}.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: one stands there twice")
        if same := _repeated(self.headings):
            raise ValueError(f"tables: two would be called {same[0]!r}; rename one")
        return self

    @property
    def contexts(self) -> tuple[str | None, ...]:
        """The conditions' names; (None,) where the grid has none."""
        return tuple(self.conditions) or (None,)

    @property
    def headings(self) -> list[str]:
        """The headings of all tables, including those of probes."""
        places = product(self.tables or (ALL_ARMS,), self.contexts, (None, *self.measures))
        return [heading(*place) for place in (*places, *product((PROBES,), self.contexts))]


class Run(NamedTuple):
    condition: str | None
    arm: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]
    folder: Path
    student: Path  # what is scored
    facts: dict[str, Any]  # the resolved recipe; another one in the folder is refused

    @property
    def name(self) -> str:
        return heading(self.condition, self.arm, f"seed {self.seed}")

    @property
    def score(self) -> Path:
        return self.folder / "score.json"

    @property
    def is_done(self) -> bool:
        return self.score.is_file()


def load_grid(path: Path) -> Grid:
    """Read a grid file. Raises UserError, in one line that names the key."""
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
    """List all runs, seed by seed, then condition by condition.

    In this order an interrupted grid has every arm. Raises UserError for a recipe that cannot run,
    before the first run trains.
    """
    if not (grid.shards / "manifest.json").is_file():
        raise UserError(f"shards: {grid.shards} has no manifest.json; build it: data_tools.build")
    _check_measures(grid)
    return [
        _run(condition, arm, grid, seed, grid.arms[arm].recipe or recipe, out)
        for seed in grid.seeds
        for condition in grid.contexts
        for arm in grid.arms
    ]


def _check_measures(grid: Grid) -> None:
    """Refuse a kind that no scored question has: the measure would miss it silently."""
    from genrecal_ds.data.index import ShardIndex

    if not grid.measures:
        return
    index = ShardIndex.load(grid.shards)
    asked = {index.kinds[code] for code in index.records["kind"][: grid.limit]}
    for name, kinds in grid.measures.items():
        if unknown := [kind for kind in kinds if kind not in asked]:
            raise UserError(
                f"measures.{name}: no question scored is of kind {unknown[0]!r}; there are "
                f"{', '.join(sorted(asked))}"
            )


def claim(run: Run) -> None:
    """Make the run's folder, or refuse one that holds another recipe's results."""
    path = run.folder / "arm.json"
    if path.is_file():
        recorded = json.loads(path.read_text())
        for key, value in run.facts.items():
            if recorded.get(key) != value:
                raise UserError(
                    f"{run.folder}: holds results of another {key}; remove it, or name another "
                    "--out"
                )
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run.facts, indent=2) + "\n")


def folder_name(name: str) -> str:
    """Make a folder name from the name of an arm or a condition."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def heading(*parts: str | None) -> str:
    """Join the parts that are there into the name of a table or a run."""
    return ", ".join(part for part in parts if part is not None)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _run(condition: str | None, arm: str, grid: Grid, seed: int, recipe: Path, out: Path) -> Run:
    folder, where = out, f"arm {arm}"
    chosen = [*grid.overrides, *grid.arms[arm].overrides]
    if condition is not None:
        chosen += grid.conditions[condition].overrides  # last: it holds for every arm
        folder, where = out / folder_name(condition), f"condition {condition}, {where}"
    folder = folder / folder_name(arm) / f"seed-{seed}"
    names = [stage.name for stage in _loaded(where, recipe, chosen).stages]
    seeds = [f"stages.{i}.seed={s}" for i, s in enumerate(stage_seeds(seed, len(names)))]
    overrides = (*chosen, f"run_dir={folder}", f"seed={seed}", *seeds)
    resolved = _loaded(where, recipe, overrides)
    check_folders(resolved)
    facts = resolved.model_dump(mode="json", exclude={"run_dir"})
    facts |= {"shards": str(grid.shards), "limit": grid.limit, "tokens": grid.max_new_tokens}
    return Run(
        condition, arm, seed, recipe, overrides, folder, folder / names[-1] / "student", facts
    )


def stage_seeds(seed: int, num_stages: int) -> list[int]:
    """One seed per stage; the last stage's is the same however many stages stand before it."""
    return [seed * ORDERS + num_stages - 1 - position for position in range(num_stages)]


def _loaded(where: str, recipe: Path, overrides: Sequence[str]):
    try:
        return load_recipe(recipe, overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
