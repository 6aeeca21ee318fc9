"""Refuses, before torch is imported, a torch out of range and a recipe that cannot run."""

import argparse
import re
from importlib.metadata import requires, version
from pathlib import Path

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.recipe_file import check_folders, load_recipe
from launch.recipes import find_recipe

SETUP = Path(__file__).resolve().parents[1] / "setup.py"  # only a checkout has it, a wheel does not


def read_recipe(arguments: argparse.Namespace, num_ranks: int) -> Recipe:
    """Read the recipe. Raises UserError for bad keys, folders, stage or batch sizes."""
    recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)
    check_folders(recipe)
    names = [stage.name for stage in recipe.stages]
    if arguments.stage not in (None, *names):
        raise UserError(f"--stage {arguments.stage}: the recipe's stages are {names}")
    for stage in recipe.stages:
        recipe.accumulation_steps(stage, num_ranks)
    return recipe


def torch_range() -> tuple[str, str]:
    """Return (lowest version, first too new), from setup.py or the installed package's facts."""
    text = SETUP.read_text() if SETUP.is_file() else "\n".join(requires("genrecal_ds") or ())
    stated = re.search(r"\btorch([<>=,.\d]+)", text)
    assert stated is not None, "setup.py requires no torch"
    bounds = dict(re.findall(r"(>=|<)([\d.]+)", stated[1]))
    return bounds[">="], bounds["<"]


def check_torch() -> None:
    """Raise UserError for an installed torch out of the range."""
    installed, (low, high) = version("torch"), torch_range()
    if not _numbers(low) <= _numbers(installed) < _numbers(high):
        raise UserError(f"torch {installed} is installed; genrecal_ds needs >= {low}, < {high}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])
