"""Finds where each parameter of a model lies in a folder's files, and fills whole models.

A stored tensor is never thrown away: each fills a parameter, or equals, element by element, the
one that does, or is of those that transformers itself leaves out.
"""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from genrecal_ds.errors import UserError
from genrecal_ds.models.tensor_files import (
    Checkpoint,
    FlatRun,
    Source,
    are_equal,
    has_safetensors,
)

SAMPLES, SAMPLE_SIZE = 16, 1024  # of a tensor's values, compared after loading


def find_sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Source]:
    """Find where every parameter of `model` (an unsharded HF model, on meta or not) comes from.

    transformers renames, splits and joins some families' tensors on load. This function follows
    transformers where values are only moved. Tied weights share the one tensor that is stored.
    Raises UserError when a parameter is missing or has another shape, when a stored tensor has no
    parameter, or when two that differ have one. So no parameter is ever silently random, and no
    tensor silently dropped. Buffers that are stored have sources too.
    """
    stored = _stored(model, checkpoint)
    _refuse_foreign(model, checkpoint, stored)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if pair := _two_of_one(model, stored):
        one, other = (source.runs[0].stored for source in pair)
        raise UserError(
            f"{checkpoint.folder}: {one} and {other} differ, but {type(model).__name__} has one "
            "parameter for both; delete the wrong one from the files"
        )
    tied = _tied_names(model)
    sources: dict[str, Source] = {}
    missing = []
    for name, value in (model.state_dict(keep_vars=True) | parameters).items():
        aliases = (name, *tied.get(name, ()))
        source = next((stored[alias] for alias in aliases if alias in stored), None)
        if source is None:
            missing += [name] if name in parameters else []  # a buffer has a value of its own
        elif source.shape != tuple(value.shape):
            raise UserError(
                f"{checkpoint.folder}: {source.runs[0].stored} has shape {source.shape}, "
                f"config.json says {tuple(value.shape)}"
            )
        else:
            sources[name] = source
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        hint = _tie_hint(model, missing)
        raise UserError(f"{checkpoint.folder}: no weights for {', '.join(missing[:3])}{more}{hint}")
    return sources


def stores_own_head(model: PreTrainedModel, folder: str | Path) -> bool:
    """Whether a folder holds two different tensors for what `model` holds as one.

    transformers' from_pretrained then leaves the two untied, whatever the config says.
    """
    is_tied = any(_tied_names(model).values())
    if not is_tied or not has_safetensors(folder):
        return False
    # A skeleton is built under torch.device("meta"), where nothing can be compared. A
    # torch.device inside zero.Init would break every later one: torch remembers, at the first,
    # which functions make tensors, and zero.Init has replaced those.
    with torch._C.DisableTorchFunction():
        return _two_of_one(model, _stored(model, Checkpoint(folder))) is not None


def untie(config: PreTrainedConfig) -> None:
    """Say in a config that the head has weights of its own, at both places that are read."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _two_of_one(model: nn.Module, stored: dict[str, Source]) -> tuple[Source, Source] | None:
    """Two stored tensors that differ and would land on one parameter."""
    for name, aliases in _tied_names(model).items():
        for alias in aliases:
            if name in stored and alias in stored and not are_equal(stored[name], stored[alias]):
                return stored[name], stored[alias]
    return None


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: [o for o in group if o != name] for group in by_id.values() for name in group}


def _tie_hint(model: PreTrainedModel, missing: list[str]) -> str:
    """What to do where the head alone is missing: most such releases have it tied."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) != 1 or missing != names:
        return ""
    return (
        "; where the head is the embedding, write tie_word_embeddings: true at the top of its "
        "config.json"
    )


def _refuse_foreign(
    model: PreTrainedModel, checkpoint: Checkpoint, stored: dict[str, Source]
) -> None:
    """Raises UserError for a stored tensor without a place; transformers' own exceptions have none.

    Those are what its classes list (a head for several tokens at once), and rotary frequencies,
    position ids and other buffers of older releases, which follow from the config.
    """
    known = model.state_dict().keys() | dict(model.named_buffers()).keys()
    keys = SimpleNamespace(missing_keys=set(), unexpected_keys=stored.keys() - known)
    model._adjust_missing_and_unexpected_keys(keys)
    if keys.unexpected_keys:
        name = next(name for name in stored if name in keys.unexpected_keys)
        raise UserError(f"{checkpoint.folder}: {name} fits no parameter of {type(model).__name__}")


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Source]:
    """{parameter name that transformers loads stored tensors into: where its values are}."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = dict.fromkeys(model.state_dict().keys(), True)  # None would say that it is not there
    prefix = model.base_model_prefix
    names = sorted(checkpoint.names, key=_by_number)
    sources: dict[str, Source] = {}
    conversions = {}
    for number, stored in enumerate(names):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, pattern = rename_source_key(stored, [], [], prefix, known)
        shape = checkpoint.shape(stored)
        if pattern is None:
            source = Source(checkpoint, shape, [FlatRun(stored, 0, math.prod(shape))])
            _add(sources, name, source)
        else:
            # One conversion object per parameter, as transformers itself does on load.
            conversion = conversions.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            conversion.add_tensor(name, stored, pattern, _row_numbers(number, shape))
    for target, conversion in conversions.items():
        moved = conversion.convert(target, model=model, config=model.config)
        for name, rows in moved.items():
            _add(sources, name, _followed(checkpoint, names, name, rows))
    return sources


def _add(sources: dict[str, Source], name: str, source: Source) -> None:
    """Give a name its source. Raises UserError where it has one that differs."""
    first = sources.setdefault(name, source)
    if first is not source and not are_equal(first, source):
        raise UserError(
            f"{source.checkpoint.folder}: {first.runs[0].stored} and {source.runs[0].stored} are "
            f"both {name} and differ; delete the wrong one from the files"
        )


ROWS_OF_A_TENSOR = 2**40  # more than any has: tells rows of one stored tensor from another's


def _row_numbers(number: int, shape: tuple[int, ...]) -> Tensor:
    """Replace a stored tensor by the numbers of its rows, to see where the rows go."""
    rows = shape if len(shape) == 1 else (*shape[:-1], 1)
    return torch.arange(math.prod(rows), device="cpu").view(rows) + number * ROWS_OF_A_TENSOR


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
    sources = find_sources(model, Checkpoint(folder))
    for name, parameter in model.named_parameters():
        parameter.copy_(sources[name].tensor())
    load_buffers(model, sources)
    _check_held(model, sources)


@torch.no_grad()
def load_buffers(model: nn.Module, sources: dict[str, Source]) -> None:
    """Fill the buffers that are stored; nothing shards them."""
    for name, buffer in model.named_buffers():
        if name in sources:
            buffer.copy_(sources[name].tensor())


def _check_held(model: nn.Module, sources: dict[str, Source]) -> None:
    """Compare what the model now holds under every name with the files, by sampled values.

    Each name of a tied weight is compared: a second one that was written over is found.
    """
    held = model.state_dict()
    for name, source in sources.items():
        flat, size = held[name].flatten(), held[name].numel()
        for start in range(0, size, max(size // SAMPLES, SAMPLE_SIZE)):
            stop = min(start + SAMPLE_SIZE, size)
            if not torch.equal(flat[start:stop], source.flat_range(start, stop).to(flat)):
                raise UserError(
                    f"{source.checkpoint.folder}: {source.runs[0].stored} is not what {name} "
                    "holds after loading; please report this"
                )
