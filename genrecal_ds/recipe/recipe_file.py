"""Turns a YAML file and overrides into a recipe, validated whole before torch is imported.

Every complaint is one line that names the file, the key and the fix. This file also reads the two
DeepSpeed JSON files that the recipe names.
"""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import Recipe

_NOT_SUPPORTED = "removed after 0.1.0, no result supports it (docs/results.md); leave it out"
_ONE_TEACHER = "removed after 0.1.0, a run has one teacher (docs/results.md); leave it out"
# Keys that recipes of earlier versions may still have, without the numbers of stages.
REMOVED = {
    "stages.answers": _NOT_SUPPORTED,
    "stages.losses.boundary_weight": _NOT_SUPPORTED,
    "teacher.answer_layer": _NOT_SUPPORTED,
    "teacher.weight": _ONE_TEACHER,
    "more_teachers": _ONE_TEACHER,
    "teacher_head": "removed after 0.1.0, the teacher's head is whole on every rank: it is under "
    "2 % of a GPU (docs/performance.md); leave it out",
}


def check_folders(recipe: Recipe) -> None:
    """Refuse missing model and data folders before anything heavy is imported."""
    sources = {"student.path": recipe.student.path}
    if recipe.teacher and any(stage.facts.has_teacher for stage in recipe.stages):
        sources["teacher.path"] = recipe.teacher.path
    for key, folder in sources.items():
        if not (folder / "config.json").is_file():
            raise UserError(f"{key}: {folder} has no config.json; name a Hugging Face model folder")
    shards = {"data.train": recipe.data.train, "data.validation": recipe.data.validation}
    shards |= {f"stages.{stage.name}.data": stage.data for stage in recipe.stages}
    for key, path in shards.items():
        if path is not None and "://" not in path and not Path(path, "manifest.json").is_file():
            raise UserError(
                f"{key}: {path} has no manifest.json; build it: python -m data_tools.build"
            )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply dotted overrides (`seed=4`, `stages.align.steps=9`).

    Relative paths are kept as written, relative to the working directory.
    Raises UserError with one line naming the file, the key and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys; see launch/recipes/")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(_expand_environment(tree))
    except ValidationError as error:
        raise UserError(f"{path}: {tree_error(error)}") from None


def _apply_override(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key=value, for example batch.micro_batch=4")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    value = yaml.safe_load(text)
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, key)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise UserError(f"override {key}: {part} holds {child!r}, not a section")
    return child


def _position(items: list, part: str, key: str) -> int:
    """Find a stage by its name, its kind or its number."""
    for position, item in enumerate(items):
        if isinstance(item, dict) and part in (item.get("name"), item.get("kind"), str(position)):
            return position
    names = [item.get("name") or item.get("kind") for item in items if isinstance(item, dict)]
    raise UserError(f"override {key}: no stage {part!r}; there are {names}")


def _expand_environment(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _expand_environment(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand_environment(value) for value in node]
    return os.path.expandvars(node) if isinstance(node, str) else node


def tree_error(error: ValidationError, tree: type[BaseModel] | None = None) -> str:
    """Put an error's first complaint into one line. tree: the file's model, default Recipe."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location) or "recipe"
    if first["type"] == "extra_forbidden":
        if since := REMOVED.get(".".join(part for part in location if not part.isdecimal())):
            return f"{key}: {since}"
        valid = list(_fields_at(first["loc"][:-1], tree or Recipe))
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{key}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key}: missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    shown = first.get("input")
    got = f" (got {shown!r})" if isinstance(shown, str | int | float | bool | None) else ""
    return f"{key}: {message}{got}"


def _fields_at(location: Sequence[str | int], tree: type[BaseModel]) -> list[str]:
    """List the field names of the section at a pydantic error's location."""
    model: Any = tree
    for part in location:
        if part not in model.model_fields:  # a number in a list, a name in a mapping
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON by packaged name or path. Raises UserError for more than structure."""
    packaged = Path(__file__).resolve().parents[2] / "ds_configs" / f"{name}.json"
    path = Path(name) if name.endswith(".json") else packaged
    if not path.is_file():
        known = sorted(file.stem for file in packaged.parent.glob("*.json"))
        raise UserError(f"deepspeed: no file {path}; packaged names: {', '.join(known)}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    owned = {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "bf16", "fp16", "optimizer", "scheduler", "gradient_clipping",
    }  # fmt: skip
    if stated := sorted(owned & config.keys()):
        raise UserError(f"{path}: {stated[0]} belongs to the recipe (YAML), remove it here")
    return config
