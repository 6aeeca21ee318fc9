"""Writes a folder of shards: tars, index.npy, then manifest.json as the mark of completeness.

Every file is written under a temporary name, flushed to disk and renamed. Nothing depends on time,
user or machine: the same samples give the same bytes.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genrecal_ds.data.index import (
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    file_sha256,
)

TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True)
class CheckedSample:
    """A sample that passed the builder's checks. Members are (extension, bytes), json first."""

    key: str
    members: list[tuple[str, bytes]]
    kind: str
    text_bytes: int
    image_sizes: list[tuple[int, int]]  # (width, height) pixels, upright


@dataclass(frozen=True)
class ShardPart:
    """One finished shard: its manifest entry, its index records, and the rows it left out.

    records: one list of integers per sample in INDEX_DTYPE's order, with `shard` 0 and `kind` a
    number into `kinds`: both become final in publish_folder. entry is None for an empty shard.
    counts: of its samples by key, in the sections of builder.SECTIONS.
    """

    entry: dict[str, Any] | None
    records: list[list[int]]
    kinds: list[str]
    rejects: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


class ShardFile:
    """One shard being written; invisible under its name until `publish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = temporary(path).open("wb")
        self._digest = hashlib.sha256()
        self._offset = 0
        self._records: list[list[int]] = []
        self._kinds: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._records)

    def append(self, sample: CheckedSample) -> None:
        """Write one sample and remember its byte range, crc32 and sizes."""
        widths, heights = zip(*sample.image_sizes, strict=True) if sample.image_sizes else ((), ())
        facts = {
            "text_bytes": sample.text_bytes,
            "num_images": len(sample.image_sizes),
            "max_width": max(widths, default=0),
            "max_height": max(heights, default=0),
        }
        self.append_bytes(tar_bytes(sample), sample.kind, facts)

    def append_bytes(self, data: bytes, kind: str, facts: dict[str, int]) -> None:
        """Write the tar bytes of one sample whose other facts are known."""
        record = {
            **facts,
            "offset": self._offset,
            "length": len(data),
            "shard": 0,
            "crc32": zlib.crc32(data),
            "kind": self._kinds.setdefault(kind, len(self._kinds)),
        }
        self._records.append([record[name] for name in INDEX_DTYPE.names or ()])
        self._write(data)

    def publish(self, rejects: Sequence[dict[str, Any]] = ()) -> ShardPart:
        """End the tar and give it its name; a shard without samples leaves no file."""
        if not self._records:
            self.close()
            temporary(self.path).unlink()
            return ShardPart(None, [], [], list(rejects))
        # two zero blocks end a tar; whole records of 10240 bytes are what tar programs write
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._offset + end) % tarfile.RECORDSIZE))
        self.close()
        publish(self.path)
        entry = {
            "name": self.path.name,
            "bytes": self._offset,
            "sha256": self._digest.hexdigest(),
            "count": len(self._records),
        }
        return ShardPart(entry, self._records, list(self._kinds), list(rejects))

    def close(self) -> None:
        """Close the file without publishing it; its temporary file stays behind."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


class ShardWriter:
    """Writes samples into shards of `shard_size`: write many times, then finish once.

    A folder without finish has no manifest and no reader accepts it.
    """

    def __init__(self, directory: Path, shard_size: int) -> None:
        self.directory, self.shard_size = directory, shard_size
        self._parts: list[ShardPart] = []
        self._open: ShardFile | None = None

    def write(self, sample: CheckedSample) -> None:
        """Append one sample."""
        self._current().append(sample)
        self._close_full()

    def copy(self, data: bytes, kind: str, facts: dict[str, int]) -> None:
        """Append one sample as tar bytes from another folder; see ShardFile.append_bytes."""
        self._current().append_bytes(data, kind, facts)
        self._close_full()

    def finish(self, build: dict[str, Any]) -> None:
        """Close the last shard and publish the folder."""
        if self._open is not None:
            self._parts.append(self._open.publish())
            self._open = None
        publish_folder(self.directory, self._parts, build)

    def close(self) -> None:
        """Give up an unfinished shard's file handle."""
        if self._open is not None:
            self._open.close()

    def _current(self) -> ShardFile:
        if self._open is None:
            self._open = ShardFile(shard_path(self.directory, len(self._parts)))
        return self._open

    def _close_full(self) -> None:
        if self._open is not None and len(self._open) == self.shard_size:
            self._parts.append(self._open.publish())
            self._open = None


def shard_path(directory: Path, number: int) -> Path:
    """Where shard `number` of a folder lies."""
    return directory / f"shard-{number:06d}.tar"


def publish_folder(
    directory: Path,
    parts: Sequence[ShardPart],
    build: dict[str, Any],
    counts: Mapping[str, dict[str, int]] | None = None,
) -> None:
    """Write the index of all parts, in order, then the manifest with the build's arguments."""
    kinds: dict[str, int] = {}
    shards = [part for part in parts if part.entry is not None]
    blocks = []
    for number, part in enumerate(shards):
        block = np.array([tuple(record) for record in part.records], INDEX_DTYPE)
        codes = [kinds.setdefault(kind, len(kinds)) for kind in part.kinds]
        block["shard"], block["kind"] = number, np.array(codes, np.uint32)[block["kind"]]
        blocks.append(block)
    records = np.concatenate(blocks) if blocks else np.empty(0, INDEX_DTYPE)
    rejected = Counter(reject["reason"] for part in parts for reject in part.rejects)
    publish_index(
        directory,
        records,
        list(kinds),
        [part.entry for part in shards if part.entry],
        {"build": build, "rejected": dict(sorted(rejected.items())), **(counts or {})},
    )


def publish_index(
    directory: Path,
    records: np.ndarray,
    kinds: Sequence[str],
    shards: Sequence[dict[str, Any]],
    facts: dict[str, Any],
) -> None:
    """Write index.npy, then the manifest: from here on readers accept the folder."""
    index_path = directory / INDEX_NAME
    with temporary(index_path).open("wb") as file:
        np.save(file, records, allow_pickle=False)
    publish(index_path)
    per_kind = np.bincount(records["kind"], minlength=len(kinds))
    manifest = {
        "schema": SCHEMA_VERSION,
        **facts,
        "num_samples": len(records),
        "samples_per_kind": dict(zip(kinds, map(int, per_kind), strict=True)),
        "kinds": list(kinds),
        "index_sha256": file_sha256(index_path),
        "shards": list(shards),
    }
    write_json(directory / MANIFEST_NAME, manifest)


def tar_bytes(sample: CheckedSample) -> bytes:
    """The sample's members as tar blocks, headers and padding included, without the tar's end."""
    parts: list[bytes] = []
    for extension, data in sample.members:
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size = len(data)
        info.mode = 0o644
        info.mtime = 0  # with no owner either: the same bytes on every day and machine
        parts += [info.tobuf(tarfile.PAX_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(parts)


def write_json(path: Path, value: Any) -> None:
    """Write a json file whole or not at all."""
    temporary(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    publish(path)


def temporary(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def publish(path: Path) -> None:
    """Flush the temporary file of `path` to disk and give it its name, durably."""
    with temporary(path).open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
