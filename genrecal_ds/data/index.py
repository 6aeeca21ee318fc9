"""Reads the index of a folder of shards, one record per sample, checked before training.

A folder holds shard-*.tar (plain webdataset), index.npy (INDEX_DTYPE, memory-mappable) and
manifest.json, written last: without it the build is not finished. webdataset itself ends
silently at a damaged tar header, so this room keeps and checks sizes, hashes and counts.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrecal_ds.data.store import ShardStore, StoreError
from genrecal_ds.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
IMAGE_COST = 2048  # one picture weighs like this many bytes of text (about 500 tokens)

# `offset` and `length` (bytes) span a whole sample with its tar headers and padding, so that the
# range is itself a tar. max_width and max_height are pixels after EXIF rotation, 0 without images.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i8"),
        ("text_bytes", "<i8"),
        ("shard", "<u4"),
        ("crc32", "<u4"),
        ("kind", "<u4"),
        ("num_images", "<u4"),
        ("max_width", "<u4"),
        ("max_height", "<u4"),
    ]
)

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar file as the manifest promises it; `num_bytes` is the size of the file."""

    name: str
    num_bytes: int
    sha256: str
    count: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """All samples of a folder in shard order. `records` [num_samples] has INDEX_DTYPE.

    Pickles as its folder and fingerprint, so a spawned worker maps the same file again.
    """

    directory: Path
    shards: tuple[Shard, ...]
    kinds: tuple[str, ...]  # by kind code
    records: np.ndarray
    fingerprint: str  # sha256 hex over the index and every shard's hash
    build: dict[str, Any]  # the builder's arguments
    store: ShardStore

    @classmethod
    def load(cls, location: str | Path | ShardStore, *, check_files: bool = True) -> "ShardIndex":
        """Read manifest and index and compare every shard's size with the manifest.

        Raises UserError naming the file, what was expected and what was found. With
        check_files=False (for `verify`) the shards are not looked at; see file_defects.
        """
        store = location if isinstance(location, ShardStore) else ShardStore(str(location))
        folder = store.directory
        try:
            store.fetch_small(MANIFEST_NAME)
            store.fetch_small(INDEX_NAME)
        except StoreError as error:
            raise UserError(f"{error}; see data.remote and data.cache") from None
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it with python -m data_tools.build")
        manifest = read_manifest(folder)
        shards = tuple(_shard(entry, folder) for entry in _get(manifest, "shards", list, folder))
        names = [shard.name for shard in shards]
        if not shards or len(set(names)) != len(names):
            raise UserError(f"{folder / MANIFEST_NAME}: shards is empty or repeats a name; rebuild")
        kinds = tuple(_get(manifest, "kinds", list, folder))
        digest = _get(manifest, "index_sha256", str, folder)
        records = _load_records(folder, digest, shards, len(kinds), "mix" in manifest)
        hashed = "\n".join([digest, *(f"{shard.sha256} {shard.name}" for shard in shards)])
        index = cls(
            directory=folder,
            shards=shards,
            kinds=kinds,
            records=records,
            fingerprint=hashlib.sha256(hashed.encode("ascii")).hexdigest(),
            build=_get(manifest, "build", dict, folder),
            store=store,
        )
        if check_files and (defects := index.file_defects()):
            raise UserError(f"{defects[0]}; restore the file or rebuild {folder}")
        return index

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (self.store, self.fingerprint)

    @property
    def classes(self) -> np.ndarray:
        """int8 [num_samples]: 0 text only, 1 one image, 2 several images."""
        return np.minimum(self.records["num_images"], 2).astype(np.int8)

    def costs(self, image_cost: int = IMAGE_COST) -> np.ndarray:
        """int64 [num_samples], in bytes of text: a stand-in for sequence length."""
        return self.records["text_bytes"] + image_cost * self.records["num_images"].astype(np.int64)

    def file_defects(self) -> list[str]:
        """One line per shard that is missing, linked, of another size, or not in the manifest."""
        if (sizes := self._remote_sizes()) is not None:
            return [
                f"{self.store.location}/{shard.name}: expected {shard.num_bytes} bytes, "
                f"actual {sizes.get(shard.name, 'none: missing')}"
                for shard in self.shards
                if sizes.get(shard.name) != shard.num_bytes
            ]
        defects = [
            defect
            for shard in self.shards
            if (defect := _file_defect(self.directory / shard.name, shard.num_bytes))
        ]
        known = {shard.name for shard in self.shards}
        strangers = sorted({path.name for path in self.directory.glob("*.tar")} - known)
        return defects + [f"{self.directory / name}: not in the manifest" for name in strangers]

    def _remote_sizes(self) -> dict[str, int] | None:
        try:
            return self.store.sizes()
        except StoreError as error:
            raise UserError(str(error)) from None


def local_path(path: str | Path) -> Path:
    """The absolute local path; UserError for a URL of any scheme, `pipe:` or `a::b`."""
    return ShardStore(str(path)).directory


def file_sha256(path: Path) -> str:
    """sha256 hex of a whole file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as a dict; UserError when absent, not json, or of another schema."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so the build is not finished; run it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest ({error}); rebuild") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {schema!r}, this version reads {SCHEMA_VERSION}; rebuild")
    return manifest


def _get(manifest: dict[str, Any], key: str, kind: type, folder: Path) -> Any:
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise UserError(f"{folder / MANIFEST_NAME}: {key} is not a {kind.__name__}; rebuild")
    return value


def _shard(entry: Any, folder: Path) -> Shard:
    """Check one manifest entry: the name becomes a path, so it may hold no slash and no scheme."""
    try:
        shard = Shard(entry["name"], int(entry["bytes"]), entry["sha256"], int(entry["count"]))
        valid = _SHARD_NAME.fullmatch(shard.name) and _SHA256.fullmatch(shard.sha256)
    except (KeyError, TypeError, ValueError):
        valid = None
    if not valid:
        raise UserError(f"{folder / MANIFEST_NAME}: {entry!r:.120} is not a local shard; rebuild")
    return shard


def _load_records(
    folder: Path, digest: str, shards: tuple[Shard, ...], num_kinds: int, is_mix: bool
) -> np.ndarray:
    """The checked index; a mix (data_tools.mix) may name a sample of a shard twice or never."""
    path = folder / INDEX_NAME
    try:
        if (actual := file_sha256(path)) != digest:
            raise UserError(f"{path}: sha256 {actual} is not the manifest's {digest}; rebuild")
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: unreadable ({error}); rebuild") from None
    if records.dtype != INDEX_DTYPE or records.ndim != 1:
        raise UserError(f"{path}: dtype {records.dtype} is not this version's; rebuild")
    counts = np.array([shard.count for shard in shards])
    sizes = np.array([shard.num_bytes for shard in shards])
    is_sound = (
        len(records) > 0
        and records["kind"].max() < num_kinds
        and records["shard"].max() < len(shards)
        and (is_mix or np.array_equal(np.bincount(records["shard"], minlength=len(shards)), counts))
        and records["offset"].min() >= 0
        and records["length"].min() > 0
        and bool((records["offset"] + records["length"] <= sizes[records["shard"]]).all())
    )
    if not is_sound:
        raise UserError(f"{path}: does not fit the shards of the manifest; rebuild")
    return records


def _file_defect(path: Path, expected: int) -> str | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return f"{path}: missing, expected {expected} bytes"
    if not stat.S_ISREG(status.st_mode):
        return f"{path}: not a regular file (links are refused)"
    if status.st_size != expected:
        return f"{path}: expected {expected} bytes, actual {status.st_size}"
    return None


def _reload(store: ShardStore, fingerprint: str) -> ShardIndex:
    """Load in a worker without checking files: the rank has already checked every one."""
    index = ShardIndex.load(store, check_files=False)
    if index.fingerprint != fingerprint:
        raise UserError(f"{store.location}: the shards changed while in use; start again")
    return index
