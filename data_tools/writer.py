"""Writes a folder of shards: tars, index.npy, then manifest.json as the mark of completeness.

Every file is written under a temporary name, flushed to disk and renamed, and nothing depends on
time, user or machine: the same samples give the same bytes.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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


class ShardWriter:
    """Packs samples into shards of `shard_size` samples and keeps their index records.

    Use: write(...) many times, then finish(...) once. A folder without finish has no manifest
    and no reader accepts it.
    """

    def __init__(self, directory: Path, shard_size: int) -> None:
        self.directory = directory
        self.shard_size = shard_size
        self.num_samples = 0
        self._shards: list[dict[str, Any]] = []
        self._records: list[tuple[int, ...]] = []
        self._kinds: dict[str, int] = {}
        self._kind_counts: Counter[str] = Counter()
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._offset = 0
        self._count = 0

    def write(self, sample: CheckedSample) -> None:
        """Append one sample and remember its byte range, crc32 and sizes."""
        if self._file is None:
            self._file = temporary(self._shard_path()).open("wb")
        data = tar_bytes(sample)
        widths, heights = zip(*sample.image_sizes, strict=True) if sample.image_sizes else ((), ())
        record = {
            "offset": self._offset,
            "length": len(data),
            "text_bytes": sample.text_bytes,
            "shard": len(self._shards),
            "crc32": zlib.crc32(data),
            "kind": self._kinds.setdefault(sample.kind, len(self._kinds)),
            "num_images": len(sample.image_sizes),
            "max_width": max(widths, default=0),
            "max_height": max(heights, default=0),
        }
        self._records.append(tuple(record[name] for name in INDEX_DTYPE.names or ()))
        self._kind_counts[sample.kind] += 1
        self._append(data)
        self._count += 1
        self.num_samples += 1
        if self._count == self.shard_size:
            self._close_shard()

    def finish(self, build: dict[str, Any], rejected: dict[str, int]) -> None:
        """Close the last shard, write the index, then the manifest with the build's arguments."""
        if self._count:
            self._close_shard()
        index_path = self.directory / INDEX_NAME
        with temporary(index_path).open("wb") as file:
            np.save(file, np.array(self._records, INDEX_DTYPE), allow_pickle=False)
        publish(index_path)
        manifest = {
            "schema": SCHEMA_VERSION,
            "build": build,
            "num_samples": self.num_samples,
            "samples_per_kind": {name: self._kind_counts[name] for name in self._kinds},
            "rejected": dict(sorted(rejected.items())),
            "kinds": list(self._kinds),
            "index_sha256": file_sha256(index_path),
            "shards": self._shards,
        }
        manifest_path = self.directory / MANIFEST_NAME
        text = json.dumps(manifest, indent=1) + "\n"
        temporary(manifest_path).write_text(text, encoding="utf-8")
        publish(manifest_path)

    def close(self) -> None:
        """Give up an unfinished shard's file handle; its temporary file stays behind."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _shard_path(self) -> Path:
        return self.directory / f"shard-{len(self._shards):06d}.tar"

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _close_shard(self) -> None:
        # two zero blocks end a tar; whole records of 10240 bytes are what tar programs write
        end = 2 * tarfile.BLOCKSIZE
        self._append(bytes(end + -(self._offset + end) % tarfile.RECORDSIZE))
        self.close()
        path = self._shard_path()
        publish(path)
        self._shards.append(
            {
                "name": path.name,
                "bytes": self._offset,
                "sha256": self._digest.hexdigest(),
                "count": self._count,
            }
        )
        self._digest, self._offset, self._count = hashlib.sha256(), 0, 0


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
