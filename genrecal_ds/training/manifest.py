"""Proves that a folder of files is complete, whole and ours: digests, atomic writes, ownership.

manifest.json names every file with its size and sha256, and carries a digest of itself.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genrecal_ds.data.index import file_sha256
from genrecal_ds.errors import UserError

MANIFEST = "manifest.json"


class HashingFile:
    """A file to write to. Its digest is known when it closes: nothing is read back."""

    def __init__(self, path: Path):
        self.path = path
        self.error: OSError | None = None  # torch.save raises its own error in place of this one
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._sha256.update(data)
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> dict[str, Any]:
        """Write everything to disk; return size and digest. Raises OSError."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": self._size, "sha256": self._sha256.hexdigest()}


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest last of all: a folder without a manifest is not complete."""
    content = {**facts, "files": files}
    write_atomically(
        folder / MANIFEST, json.dumps({**content, "digest": _digest(content)}, indent=2)
    )
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest. Raises UserError when the manifest is missing or was changed."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
        is_whole = digest == _digest(manifest) and isinstance(manifest["files"], dict)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path}: missing or damaged")
    return manifest


def defect(folder: Path, files: dict[str, dict[str, Any]], names: Iterable[str]) -> str | None:
    """Find the first of `names` that differs from the manifest, and say what is wrong."""
    for name in names:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes, not {files[name]['bytes']}"
            if file_sha256(path) != files[name]["sha256"]:
                return f"{name} is damaged: its sha256 is not the recorded one"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text so that a crash leaves the old text or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(path: Path) -> None:
    """Put the names of a folder's files onto the disk; a file's own fsync does not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder, or a file in it, that another user owns or everyone may write.

    DeepSpeed's files are pickles: whoever can write them can run code here. Raises UserError.
    """
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        writable = bool(status.st_mode & stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode)
        if status.st_uid == os.getuid() and not writable:
            continue
        why = "anyone may write it" if writable else f"it belongs to user {status.st_uid}"
        raise UserError(
            f"{path}: {why}, and loading a checkpoint runs what is in it; chown or chmod it, "
            "or say --trust-checkpoint"
        )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
