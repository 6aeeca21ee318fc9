"""Gives the plan every sample's length: both models' tokens, or an estimate from the index.

Measured lengths come from a table that `python -m data_tools.tokens` writes beside the shards,
one per pair of tokenizers and processors. The table's hash belongs to the plan, because other
lengths give another order.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrecal_ds.data.index import ShardIndex, file_sha256
from genrecal_ds.data.store import StoreError
from genrecal_ds.errors import UserError

TABLE_SCHEMA = 1
SIDES = ("teacher", "student")
# Tokens of a sample, pictures included, and the visual ones among them; -1: cannot be encoded.
TABLE_DTYPE = np.dtype(
    [(f"{side}{part}", "<i4") for side in SIDES for part in ("", "_visual")]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Lengths:
    """values: [num_samples], the cost of each sample. digest: identifies them."""

    values: np.ndarray
    digest: str


def estimated(index: ShardIndex) -> Lengths:
    """Estimate from the index: bytes of text, a picture counting as many; reads no data."""
    return Lengths(index.costs(), "estimated")


def measured(index: ShardIndex, digests: dict[str, str], max_lengths: dict[str, int]) -> Lengths:
    """The sum of both sides' tokens, each at most its max_length.

    digests, max_lengths: by side, `teacher` and `student`, or `student` alone for a stage without
    a teacher. Raises UserError with the command that makes the table.
    """
    table, digest = load_table(index, digests)
    values = np.zeros(len(index), np.int64)
    for side, longest in max_lengths.items():
        values += np.clip(table[side], 0, longest)
    sides = "+".join(f"{side}<={longest}" for side, longest in max_lengths.items())
    return Lengths(values, f"{digest}:{sides}")


def table_path(folder: Path, digests: dict[str, str]) -> Path:
    """tokens-<pair>.npy beside the shards; its facts lie in tokens-<pair>.json."""
    pair = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return folder / f"tokens-{pair[:16]}.npy"


def load_table(index: ShardIndex, digests: dict[str, str]) -> tuple[np.ndarray, str]:
    """(TABLE_DTYPE [num_samples], sha256 of the file), checked against shards and pair."""
    path = table_path(index.directory, digests)
    try:
        for name in (path.name, path.with_suffix(".json").name):
            index.store.fetch_small(name)
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (StoreError, FileNotFoundError):
        sides = " ".join(f"--{side} FOLDER" for side in digests)
        raise UserError(
            f"{path}: no table of this pair's token counts; make it: "
            f"python -m data_tools.tokens {index.directory} {sides}, or data.lengths=estimated"
        ) from None
    digest = file_sha256(path)
    expected = table_facts(index, digests, digest)
    for key, value in expected.items():
        if facts.get(key) != value:
            raise UserError(
                f"{path}: {key} is {facts.get(key)!r}, not {value!r}; the shards or the pair "
                "changed: make the table again with data_tools.tokens"
            )
    table = np.load(path, allow_pickle=False)
    if table.dtype != TABLE_DTYPE or table.shape != (len(index),):
        raise UserError(f"{path}: dtype or size is not this version's; make the table again")
    return table, digest


def table_facts(index: ShardIndex, digests: dict[str, str], digest: str) -> dict[str, Any]:
    """What must be equal between a table's json file and the run that uses it."""
    return {
        "schema": TABLE_SCHEMA,
        "fingerprint": index.fingerprint,
        "digests": digests,
        "sha256": digest,
    }
