"""Reads a source's files: strict JSON, and pictures from below their root folder only."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from genrecal_ds.data.decode import MAX_IMAGE_BYTES, SampleError, parse_json
from genrecal_ds.errors import UserError

_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


class ImageRoot:
    """Reads pictures below one folder. No path leaves the folder by `..`, `/` or a symlink."""

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder of images; name it with --images")
        self.folder = Path(folder).resolve()

    def read(self, name: Any) -> tuple[str, bytes]:
        """(extension, bytes) of a picture named relative to the root.

        Raises SampleError: image_path (outside the root, or no path at all), image_missing,
        image_bytes, image_format.
        """
        if not isinstance(name, str) or not name or "\0" in name:
            raise SampleError("image_path", f"{name!r:.80} is not a file name")
        path = self.folder / name
        try:
            real = Path(os.path.realpath(path, strict=True))
            if not real.is_relative_to(self.folder):
                raise SampleError("image_path", f"{name!r:.200} leads out of {self.folder}")
            if not real.is_file():
                raise SampleError("image_path", f"{name!r:.200} is not a regular file")
            with real.open("rb") as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise SampleError("image_missing", f"{name!r:.200}: {error.strerror}") from error
        return with_extension(data)


def with_extension(data: bytes) -> tuple[str, bytes]:
    """(extension by the bytes' signature, bytes); the name is not trusted. Raises SampleError."""
    if len(data) > MAX_IMAGE_BYTES:
        raise SampleError("image_bytes", f"more than {MAX_IMAGE_BYTES} bytes")
    for signature, extension in _SIGNATURES.items():
        if data.startswith(signature):
            return extension, data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", data
    raise SampleError("image_format", f"bytes {data[:8]!r} are no JPEG, PNG or WebP")


def read_json(path: Path) -> Any:
    """Read a whole annotation file. Raises UserError naming the file: no row could be rejected."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; see the format's layout in docs/data.md"
        ) from None
    except SampleError as error:
        raise UserError(f"{path}: {error}; mend or download the file again") from None


def field_of(row: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """row[key], checked. Raises SampleError row (not an object) or field (absent or wrong type)."""
    if not isinstance(row, dict):
        raise SampleError("row", f"{row!r:.80} is not an object")
    value = row.get(key)
    # bool is an int to isinstance; no format has a bool where it has a number
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SampleError("field", f"{key}: {value!r:.80}")
    return value


def digest_files(paths: Iterable[Path]) -> str:
    """sha256 hex over the names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                yield block
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
