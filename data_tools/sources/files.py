"""Reads a source's files: strict JSON, and pictures from below their root folder only."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, features

from data_tools.sources import Evidence, Picture, Rejected
from genrecal_ds.data.decode import MAX_IMAGE_BYTES, SampleError, decode_other, parse_json
from genrecal_ds.errors import UserError

_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_OTHER_SIGNATURES = {
    b"GIF87a": "gif", b"GIF89a": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff",
}  # fmt: skip
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


class ImageRoot:
    """Reads pictures below one folder. No path leaves the folder by `..`, `/` or a symlink.

    links: one more folder into which symlinks may lead, as those of a hub's cache do from
    snapshots/ into blobs/.
    """

    def __init__(self, folder: str | Path, links: str | None = None) -> None:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder of images; name it with --images")
        self.folder = Path(folder).resolve()
        self.roots = (self.folder, *linked_folder(links))

    def read(self, name: Any) -> Picture:
        """The picture named relative to the root.

        Raises SampleError: image_path (outside the root, or no path at all), image_missing,
        image_bytes, image_format.
        """
        if not isinstance(name, str) or not is_file_name(name):
            raise SampleError("image_path", f"{name!r:.80} is not a file name")
        evidence = self._evidence(name)
        inputs = [evidence] if evidence else []
        try:
            picture = with_extension(self._bytes(name))
            return Picture(*picture, evidence=evidence, converted=picture.converted)
        except OSError as error:
            detail = f"{name!r:.200}: {error.strerror} below {self.folder}"
            raise Rejected("image_missing", detail, inputs=inputs) from error
        except SampleError as error:
            raise Rejected(error.reason, error.detail, inputs=inputs) from error

    def has(self, name: str) -> bool:
        """Whether a name is that of something below the root."""
        return len(name) < 4096 and is_file_name(name) and (self.folder / name).exists()

    def _bytes(self, name: str) -> bytes:
        path = self.folder / name
        real = Path(os.path.realpath(path, strict=True))
        if not any(real.is_relative_to(root) for root in self.roots):
            raise SampleError(
                "image_path",
                f"{name!r:.200} leads out of {self.folder}, into {real.parent}; where that is "
                "meant, as in a hub's cache, name it with --allow-links",
            )
        if not real.is_file():
            raise SampleError("image_path", f"{name!r:.200} is not a regular file")
        with real.open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    def _evidence(self, name: str) -> Evidence | None:
        path = Path(os.path.normpath(self.folder / name))
        return evidence_of(path) if path.is_relative_to(self.folder) else None


def is_file_name(name: str) -> bool:
    """Whether the system could know a file by this name."""
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def linked_folder(links: str | None) -> list[Path]:
    """The folder of --allow-links, if one is given. Raises UserError where it is none."""
    if links is None:
        return []
    if not Path(links).is_dir():
        raise UserError(f"--allow-links {links}: no such folder; name the one that links lead to")
    return [Path(links).resolve()]


def evidence_of(path: str | Path) -> Evidence:
    """A file's size and time now."""
    try:
        found = os.stat(path)
    except OSError:
        return Evidence(str(path), -1, 0)
    return Evidence(str(path), found.st_size, found.st_mtime_ns)


def with_extension(data: bytes) -> Picture:
    """The picture with an extension by its bytes' signature; the name is not trusted.

    What shards do not hold (GIF, BMP, TIFF, AVIF, HEIC) becomes a PNG of the same pixels. Raises
    SampleError.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise SampleError("image_bytes", f"more than {MAX_IMAGE_BYTES} bytes")
    for signature, extension in _SIGNATURES.items():
        if data.startswith(signature):
            return Picture(extension, data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Picture("webp", data)
    if other := _other_format(data):
        return _converted(data, other)
    known = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
    raise SampleError("image_format", f"bytes {data[:8]!r} are no {known}")


def _other_format(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        if b"avi" in data[8:11] or b"avif" in data[16:64]:
            return "avif"
        return "heic" if data[8:12] in _HEIC_BRANDS else None
    return next(
        (n for signature, n in _OTHER_SIGNATURES.items() if data.startswith(signature)), None
    )


def _converted(data: bytes, name: str) -> Picture:
    if name == "avif" and not features.check("avif"):
        raise SampleError("image_format", "AVIF, and this Pillow cannot read it; update Pillow")
    if name == "heic":
        try:
            import pillow_heif
        except ImportError:
            raise SampleError("image_format", "HEIC needs pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    image: Image.Image = decode_other(data, name)
    image.save(buffer, "PNG")
    return Picture("png", buffer.getvalue(), converted=name)


def read_json(path: Path) -> Any:
    """Read a whole annotation file. Raises UserError naming the file: no row could be rejected."""
    try:
        return parse_json(path.read_bytes(), allow_nan=True)
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
