"""Reads a folder's safetensors: one tensor, or only the rows that a rank owns."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from genrecal_ds.errors import UserError


class Checkpoint:
    """The tensors of a Hugging Face folder by their names in the files. Reads lazily."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._file_of = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single.name)
        else:
            pickled = sorted(
                p.name for s in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(s)
            )
            content = f"{pickled[0]} is a pickle, which can run code" if pickled else "no weights"
            raise UserError(
                f"{self.folder}: {content}; save the model as model.safetensors (from_pretrained, "
                "then save_pretrained)"
            )

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def _open(self, name: str):
        return safe_open(self.folder / self._file_of[name], framework="pt")

    def dtypes(self) -> list[str]:
        """The dtypes in the files, in safetensors' words (BF16, F32), read from the headers."""
        dtypes = set()
        for file_name in sorted(set(self._file_of.values())):
            with safe_open(self.folder / file_name, framework="pt") as file:
                dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}
        return sorted(dtypes)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        with self._open(name) as file:
            return file.get_tensor(name)

    def flat_range(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, reading only the rows they lie in."""
        with self._open(name) as file:
            part = file.get_slice(name)
            shape = part.get_shape()
            if not shape:
                return file.get_tensor(name).reshape(1)[start:stop]
            row = 1
            for size in shape[1:]:
                row *= size
            first, last = start // row, -(-stop // row)
            return part[first:last].reshape(-1)[start - first * row : stop - first * row]


class FlatRun(NamedTuple):
    """Elements [first, first + size) of a stored tensor, flattened."""

    stored: str
    first: int
    size: int


class Source:
    """Where a parameter's values lie: runs of stored tensors, one behind the other."""

    def __init__(self, checkpoint: Checkpoint, shape: tuple[int, ...], runs: list[FlatRun]):
        self.checkpoint, self.shape, self.runs = checkpoint, shape, runs

    def flat_range(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, reading only the rows they lie in."""
        parts, offset = [], 0
        for run in self.runs:
            first, last = max(start - offset, 0), min(stop - offset, run.size)
            if first < last:
                read = self.checkpoint.flat_range
                parts.append(read(run.stored, run.first + first, run.first + last))
            offset += run.size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensor(self) -> Tensor:
        return self.flat_range(0, sum(run.size for run in self.runs)).view(self.shape)


def find_sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Source]:
    """Find where every parameter of `model` (an unsharded HF model, on meta or not) comes from.

    transformers renames, splits and joins some families' tensors on load. This function follows
    transformers where values are only moved. Tied weights share the one tensor that is stored.
    Raises UserError when a parameter is missing or has another shape, or when a stored tensor has
    no parameter. So no parameter is ever silently random.
    """
    stored = _stored(model, checkpoint)
    sources: dict[str, Source] = {}
    missing = []
    tied = _tied_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        source = next(
            (stored[alias] for alias in (name, *tied.get(name, ())) if alias in stored), None
        )
        if source is None:
            missing.append(name)
        elif source.shape != tuple(parameter.shape):
            raise UserError(
                f"{checkpoint.folder}: {source.runs[0].stored} has shape {source.shape}, "
                f"config.json says {tuple(parameter.shape)}"
            )
        else:
            sources[name] = source
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{checkpoint.folder}: no weights for {', '.join(missing[:3])}{more}")
    known = parameters.keys() | dict(model.named_buffers()).keys()
    if foreign := [name for name in stored if name not in known]:
        raise UserError(
            f"{checkpoint.folder}: {foreign[0]} fits no parameter of {type(model).__name__}"
        )
    return sources


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: [o for o in group if o != name] for group in by_id.values() for name in group}


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Source]:
    """{parameter name that transformers loads stored tensors into: where its values are}."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = dict.fromkeys(model.state_dict().keys())
    names = sorted(checkpoint.names, key=_by_number)
    sources, conversions = {}, {}
    for number, stored in enumerate(names):
        name, pattern = stored, None
        if stored not in known:
            name, pattern = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, known
            )
        shape = checkpoint.shape(stored)
        if pattern is None:
            sources[name] = Source(checkpoint, shape, [FlatRun(stored, 0, math.prod(shape))])
        else:
            # One conversion object per parameter, as transformers itself does on load.
            conversion = conversions.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            conversion.add_tensor(name, stored, pattern, _row_numbers(number, shape))
    for target, conversion in conversions.items():
        moved = conversion.convert(target, model=model, config=model.config)
        for name, rows in moved.items():
            sources[name] = _followed(checkpoint, names, name, rows)
    return sources


ROWS_OF_A_TENSOR = 2**40  # more than any has: tells rows of one stored tensor from another's


def _row_numbers(number: int, shape: tuple[int, ...]) -> Tensor:
    """Replace a stored tensor by the numbers of its rows, to see where the rows go."""
    rows = shape if len(shape) == 1 else (*shape[:-1], 1)
    return torch.arange(math.prod(rows)).view(rows) + number * ROWS_OF_A_TENSOR


def _followed(checkpoint: Checkpoint, names: list[str], name: str, rows: Tensor) -> Source:
    flat = rows.flatten()
    starts = [0, *((flat.diff() != 1).nonzero().flatten() + 1).tolist(), len(flat)]
    runs, widths = [], set()
    for start, stop in itertools.pairwise(starts):
        number, first = divmod(int(flat[start]), ROWS_OF_A_TENSOR)
        shape = checkpoint.shape(names[number])
        width = 1 if len(shape) == 1 else shape[-1]
        widths.add(width)
        runs.append(FlatRun(names[number], first * width, (stop - start) * width))
    is_moved = not rows.is_floating_point() and len(widths) == 1
    if not is_moved or (rows.ndim > 1 and rows.shape[-1] != 1):
        raise UserError(
            f"{name}: transformers rewrites this tensor's values on load; save the folder once "
            "with from_pretrained(..).save_pretrained(.., save_original_format=False)"
        )
    shape = tuple(rows.shape) if rows.ndim == 1 else (*rows.shape[:-1], widths.pop())
    return Source(checkpoint, shape, runs)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort names by their numbers: experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


@torch.no_grad()
def load_full(model: PreTrainedModel, folder: str | Path) -> None:
    """Fill an unsharded HF model from its folder; the same rules as the sharded load."""
    checkpoint = Checkpoint(folder)
    parameters = dict(model.named_parameters())
    for name, source in find_sources(model, checkpoint).items():
        if name in parameters:
            parameters[name].copy_(source.tensor())
