"""Reads a folder's safetensors: one tensor, or only the rows that a rank owns."""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genrecal_ds.errors import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 2**24  # elements compared at a time


def has_safetensors(folder: str | Path) -> bool:
    """Whether a folder has weights that Checkpoint reads; config and index can be planned with."""
    path = Path(folder)
    return (path / _SINGLE).is_file() or (
        (path / _INDEX).is_file() and any(path.glob("*.safetensors"))
    )


class Checkpoint:
    """The tensors of a Hugging Face folder by their names in the files. Reads lazily."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        single, index = self.folder / _SINGLE, self.folder / _INDEX
        if single.is_file():  # beside an index too, as transformers does
            self._file_of = dict.fromkeys(_names_in(single), single.name)
        elif index.is_file():
            self._file_of = _indexed(index)
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

    def path_of(self, name: str) -> Path:
        return self.folder / self._file_of[name]

    def _open(self, name: str):
        return safe_open(self.path_of(name), framework="pt")

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


def are_equal(one: Source, other: Source) -> bool:
    """Whether two sources hold the same numbers, each one compared, as their files have them.

    A head that differs from the embedding in a few added tokens alone is a head of its own.
    """
    return one.runs == other.runs or (
        one.shape == other.shape and _are_equal(_Known(one), _Known(other))
    )


class _Known:
    """A source as the key of a memory: the same runs of files that have not changed since."""

    def __init__(self, source: Source):
        paths = {source.checkpoint.path_of(run.stored) for run in source.runs}
        stamps = ((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(paths))
        self.source, self.key = source, (*stamps, *source.runs)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.key == other.key


@functools.cache
def _are_equal(one: _Known, other: _Known) -> bool:
    """Remembered: every skeleton of a folder asks again, and a head can have gigabytes."""
    size = math.prod(one.source.shape)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        mine, others = (known.source.flat_range(start, stop) for known in (one, other))
        if mine.dtype != others.dtype:  # one kept in fp32, say, and one rounded to bf16
            mine, others = mine.double(), others.double()
        if not torch.equal(mine, others):
            return False
    return True


def _indexed(index: Path) -> dict[str, str]:
    """{tensor: file} of all files that an index names. Raises UserError where they do not fit."""
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not an index with a weight_map; download it again") from None
    files = sorted(set(named.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        more = f" and {len(absent) - 1} more files" if len(absent) > 1 else ""
        raise UserError(
            f"{index}: names {absent[0]}{more}, not in the folder; download the release again"
        )
    file_of: dict[str, str] = {}
    for file_name in files:
        for name in _names_in(index.parent / file_name):
            if name in file_of:
                raise UserError(
                    f"{index.parent}: {name} is in {file_of[name]} and in {file_name}; take all "
                    "its files from one release"
                )
            file_of[name] = file_name
    if absent := [name for name in named if name not in file_of]:
        raise UserError(
            f"{index}: {named[absent[0]]} has no {absent[0]}; take all its files from one release"
        )
    return file_of


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file: {error}; take all its files from one release"
        ) from None
