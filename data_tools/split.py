"""Divides a folder of shards into several, so that no picture is in two of them.

Samples that share a picture, directly or through others, stay together. A text-only sample goes by
its text. A group's content and the seed alone decide its part, so adding samples later moves no
sample.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.build import not_negative, positive
from data_tools.progress import progress_bar
from data_tools.writer import ShardWriter
from genrecal_ds.console.command import command, complain
from genrecal_ds.data.index import MANIFEST_NAME, ShardIndex, local_path
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.errors import UserError

EXAMPLE = """example:
  python -m data_tools.split shards/all --out shards/divided train=0.95 validation=0.05
"""


class Groups:
    """Which samples belong together: union-find over hashes of their pictures."""

    def __init__(self) -> None:
        self._parent: dict[bytes, bytes] = {}

    def join(self, hashes: Sequence[bytes]) -> bytes:
        """Put these hashes into one group; return one of them, as the argument of find."""
        roots = [self.find(value) for value in hashes]
        smallest = min(roots)  # the same name whatever the order of samples
        for root in roots:
            self._parent[root] = smallest
        return hashes[0]

    def find(self, value: bytes) -> bytes:
        """The group's name, its smallest hash."""
        root = value
        while (above := self._parent.setdefault(root, root)) != root:
            root = above
        while self._parent[value] != root:
            self._parent[value], value = root, self._parent[value]
        return root


def content_hashes(members: dict[str, bytes]) -> list[bytes]:
    """sha256 of each picture's bytes, or of the turns for a sample without pictures."""
    pictures = [data for name, data in members.items() if name != "json"]
    if not pictures:
        turns = json.loads(members["json"])["messages"]
        pictures = [json.dumps(turns, sort_keys=True).encode()]
    return [hashlib.sha256(data).digest() for data in pictures]


def choose(group: bytes, shares: dict[str, float], seed: int) -> str:
    """Choose a group's part: its name and the seed give a number in [0, 1), against the shares."""
    digest = hashlib.sha256(f"{seed}:".encode() + group).digest()
    place, total = int.from_bytes(digest[:8], "big") / 2**64, sum(shares.values())
    for name, share in shares.items():
        place -= share / total
        if place < 0:
            return name
    return name  # rounding


def split(
    folder: str | Path, out: Path, shares: dict[str, float], seed: int, shard_size: int
) -> Counter[str]:
    """Write out/NAME for every part; returns samples per part. Raises UserError."""
    index = ShardIndex.load(folder)
    reader, groups = ShardReader(index), Groups()
    for name in shares:
        if (out / name).exists() and any((out / name).iterdir()):
            raise UserError(f"{out / name}: is not empty; choose another --out")
    members: list[bytes] = []
    with progress_bar() as progress:
        for number in progress.track(range(len(index)), description="hashing"):
            members.append(groups.join(content_hashes(reader.members(number))))
        writers = {}
        for name in shares:
            (out / name).mkdir(parents=True, exist_ok=True)
            writers[name] = ShardWriter(out / name, shard_size)
        counts: Counter[str] = Counter()
        for number in progress.track(range(len(index)), description="writing"):
            name = choose(groups.find(members[number]), shares, seed)
            copy_sample(reader, number, writers[name])
            counts[name] += 1
    if empty := sorted(shares.keys() - counts.keys()):
        raise UserError(f"{out}: no sample fell into {', '.join(empty)}; raise its share")
    facts = {"split_of": index.fingerprint, "shares": shares, "seed": seed}
    for name, writer in writers.items():
        writer.finish({**facts, "part": name, "shard_size": shard_size})
    return counts


def copy_sample(reader: ShardReader, number: int, writer: ShardWriter) -> None:
    """Copy one sample with its facts, byte for byte."""
    record = reader.index.records[number]
    names = ("text_bytes", "num_images", "max_width", "max_height")
    facts = {name: int(record[name]) for name in names}
    writer.copy(reader.tar_bytes(number), reader.index.kinds[int(record["kind"])], facts)


def shares_of(words: Sequence[str]) -> dict[str, float]:
    """NAME=SHARE words as a dict; UserError for anything else."""
    shares = {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = np.nan
        if not name.replace("-", "").replace("_", "").isalnum() or not 0 < share < np.inf:
            raise UserError(f"{word}: write NAME=SHARE, for example validation=0.05")
        shares[name] = share
    if len(shares) < 2 or len(shares) != len(words):
        raise UserError("name two parts or more, each once: train=0.95 validation=0.05")
    return shares


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 (a damaged sample) or 2 (a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.split", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", metavar="SHARDS")
    parser.add_argument("parts", nargs="+", metavar="NAME=SHARE")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder for the parts")
    parser.add_argument("--seed", default=0, type=not_negative, metavar="S")
    parser.add_argument("--shard-size", default=512, type=positive, metavar="SAMPLES")
    args = parser.parse_args(argv)
    try:
        out = local_path(args.out)
        if (out / MANIFEST_NAME).exists():
            raise UserError(f"{out}: is a folder of shards; choose another --out")
        counts = split(args.directory, out, shares_of(args.parts), args.seed, args.shard_size)
    except BadSample as error:
        complain(f"{error}; nothing is split before data_tools.verify is clean")
        return 1
    for name, count in counts.items():
        print(f"{out / name}: {count} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
