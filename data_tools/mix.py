"""Joins folders of shards into one; a weight says how often each folder's samples appear.

Weight 2.5 puts every sample of a folder into the index twice, and a seeded half of the samples a
third time. Weight 0.5 takes a half. The tars are hard links where the file system allows, else
copies.
"""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.build import not_negative
from data_tools.writer import publish, publish_index, shard_path, temporary
from genrecal_ds.console.command import command
from genrecal_ds.data.index import ShardIndex, file_sha256, local_path
from genrecal_ds.errors import UserError

EXAMPLE = """example:
  python -m data_tools.mix --out shards/mixed shards/llava=1 shards/vqav2=0.5 shards/docvqa=3
"""


def repeats(num_samples: int, weight: float, seed: int) -> np.ndarray:
    """int64 [num_samples]: floor(weight), and one more for the fraction's share, by seeded choice.

    Philox words sort the samples, so the choice outlives NumPy's releases; see data/plan.py.
    """
    counts = np.full(num_samples, int(weight), np.int64)
    num_more = round((weight - int(weight)) * num_samples)
    words = np.random.Philox(key=np.array([seed, 1], np.uint64)).random_raw(num_samples)
    counts[np.argsort(words, kind="stable")[:num_more]] += 1
    return counts


def mix(weights: dict[Path, float], out: Path, seed: int) -> int:
    """Write the mix; returns its number of samples. Raises UserError."""
    indices = [ShardIndex.load(folder) for folder in weights]
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, int] = {}
    shards: list[dict[str, Any]] = []
    blocks, sources = [], []
    for number, (index, weight) in enumerate(zip(indices, weights.values(), strict=True)):
        counts = repeats(len(index), weight, seed + number)
        block = np.repeat(np.array(index.records), counts)
        codes = [kinds.setdefault(kind, len(kinds)) for kind in index.kinds]
        block["kind"] = np.array(codes, np.uint32)[block["kind"]]
        block["shard"] += len(shards)
        for shard in index.shards:
            path = shard_path(out, len(shards))
            link_or_copy(index.directory / shard.name, path, shard.sha256)
            entry = {"name": path.name, "bytes": shard.num_bytes, "sha256": shard.sha256}
            shards.append({**entry, "count": shard.count})
        blocks.append(block)
        facts = {"fingerprint": index.fingerprint, "weight": weight, "num_samples": len(index)}
        sources.append({**facts, "num_entries": len(block)})
    records = np.concatenate(blocks)
    if not len(records):
        raise UserError(f"{out}: the weights leave no sample; raise one")
    facts = {"build": {"mix": sources, "seed": seed}, "rejected": {}, "mix": sources}
    publish_index(out, records, list(kinds), shards, facts)
    return len(records)


def link_or_copy(source: Path, target: Path, sha256: str) -> None:
    """Put the same bytes under another name. Raises UserError when a copy differs."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, temporary(target))
        if file_sha256(temporary(target)) != sha256:
            raise UserError(f"{source}: is not what its manifest says; run verify") from None
        publish(target)


def weights_of(words: Sequence[str]) -> dict[Path, float]:
    """FOLDER=WEIGHT words as a dict; UserError for anything else."""
    weights: dict[Path, float] = {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not name or not 0 < weight < 1e6:
            raise UserError(f"{word}: write FOLDER=WEIGHT, for example shards/vqav2=0.5")
        weights[local_path(name)] = weight
    if len(weights) != len(words):
        raise UserError("a folder is named twice; give it one weight")
    return weights


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 or 2 (a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.mix", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", nargs="+", metavar="FOLDER=WEIGHT")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", default=0, type=not_negative, metavar="S")
    args = parser.parse_args(argv)
    weights, out = weights_of(args.folders), local_path(args.out)
    num_samples = mix(weights, out, args.seed)
    print(f"{args.out}: {num_samples} samples an epoch from {len(weights)} folders")
    return 0


if __name__ == "__main__":
    sys.exit(main())
