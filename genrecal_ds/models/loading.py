"""Reading a folder's safetensors: one tensor, or only the rows that a rank owns."""

import json
from pathlib import Path

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
            found = f"{pickled[0]} is a pickle, which can run code" if pickled else "no weights"
            raise UserError(
                f"{self.folder}: {found}; save the model as model.safetensors (from_pretrained, "
                "then save_pretrained)"
            )

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def _open(self, name: str):
        return safe_open(self.folder / self._file_of[name], framework="pt")

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


def file_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Map every parameter name of `model` (an HF model) to its tensor's name in the files.

    transformers renames some families' tensors on load; only renamings are followed. Tied
    weights map to the one tensor that is stored. Raises UserError when a parameter is missing
    or of another shape, or a stored tensor has no home: nothing is ever silently random.
    """
    renamed = _renamed(model, checkpoint.names)
    names: dict[str, str] = {}
    missing = []
    tied = _tied_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        source = next((alias for alias in (name, *tied.get(name, ())) if alias in renamed), None)
        if source is None:
            missing.append(name)
            continue
        names[name] = renamed[source]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the full shape there
        if tuple(shape) != checkpoint.shape(renamed[source]):
            raise UserError(
                f"{checkpoint.folder}: {renamed[source]} has shape "
                f"{checkpoint.shape(renamed[source])}, config.json says {tuple(shape)}"
            )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{checkpoint.folder}: no weights for {', '.join(missing[:3])}{more}")
    known = parameters.keys() | dict(model.named_buffers()).keys()
    if foreign := [name for name in renamed if name not in known]:
        raise UserError(
            f"{checkpoint.folder}: {foreign[0]} fits no parameter of {type(model).__name__}"
        )
    return names


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: [o for o in group if o != name] for group in by_id.values() for name in group}


def _renamed(model: PreTrainedModel, stored_names: list[str]) -> dict[str, str]:
    """{parameter name that transformers loads a stored tensor into: the stored name}."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    known = dict.fromkeys(model.state_dict().keys())
    names = {}
    for stored in sorted(stored_names):
        name, converted = stored, None
        if stored not in known:
            name, converted = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, known
            )
        if converted is not None:
            raise UserError(
                f"{stored}: transformers rewrites this tensor's values on load; save the folder "
                "once with from_pretrained(..).save_pretrained(.., save_original_format=False)"
            )
        names[name] = stored
    return names


@torch.no_grad()
def load_full(model: PreTrainedModel, folder: str | Path) -> None:
    """Fill an unsharded HF model from its folder; the same rules as the sharded load."""
    checkpoint = Checkpoint(folder)
    parameters = dict(model.named_parameters())
    for name, stored in file_names(model, checkpoint).items():
        if name in parameters:
            parameters[name].copy_(checkpoint.tensor(stored))
