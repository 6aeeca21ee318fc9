"""Reads other people's webdataset shards, each checked whole before its first sample.

webdataset ends a damaged tar in silence, merges keys with dots, and its decoder unpickles. This
module refuses a shard with anything unexpected in it, by name. It unpacks nothing and runs nothing.
"""

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data_tools.sources import RawSample, RowSource, assistant, user
from data_tools.sources.conversations import (
    CONVERSATION_KEYS,
    id_of,
    kind_of,
    scored_answers,
    to_messages,
)
from data_tools.sources.files import with_extension
from genrecal_ds.data.decode import (
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    MAX_RECORD_BYTES,
    RECORD_KEYS,
    SampleError,
    parse_json,
)
from genrecal_ds.data.index import file_sha256
from genrecal_ds.errors import UserError

CAPTION_QUESTION = "Describe the image."
# 0.jpg, img1.jpg: more pictures of a key. Anything else (seg.png, meta.json) would be guessed at.
_EXTENSION = re.compile(rf"json|txt|([a-z_-]*[0-9]+\.)?({'|'.join(IMAGE_FORMATS)})")


def open_source(path: str) -> "Webdataset":
    """path: a .tar, or a folder of them. Members: pictures, and a json or a txt (caption) a key.

    Raises UserError for a shard that is compressed, cut off, or holds a link, a device, another
    extension, a name that leads elsewhere, a key in two places or a member twice. Pictures of a
    key are its jpg, png, ... or numbered ones (0.jpg, img1.jpg), in natural order.
    """
    return Webdataset(Path(path))


@dataclass
class _Entry:
    """One key's members: extension -> (offset, size) in the shard."""

    path: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class Webdataset(RowSource):
    """Rows are the keys, shards by name."""

    name = "webdataset"

    def __init__(self, path: Path) -> None:
        shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not shards:
            raise UserError(f"{path}: holds no .tar; name a shard or a folder of shards")
        self._entries = [entry for shard in shards for entry in _scan(shard)]
        hashes = [f"{shard.name} {file_sha256(shard)}" for shard in shards]
        self.digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def row(self, number: int) -> RawSample:
        entry = self._entries[number]
        names = [name for name in entry.members if name.rsplit(".", 1)[-1] in IMAGE_FORMATS]
        pictures = [
            with_extension(_read(entry, name, MAX_IMAGE_BYTES))
            for name in sorted(names, key=_natural)
        ]
        if "json" not in entry.members:
            return _caption(entry, pictures)
        item = parse_json(_read(entry, "json", MAX_RECORD_BYTES))
        if not isinstance(item, dict):
            raise SampleError("row", f"{item!r:.80} is not an object")
        if "txt" in entry.members and not CONVERSATION_KEYS & item.keys():
            return _caption(entry, pictures)  # img2dataset's json holds the download's facts
        if item.keys() == RECORD_KEYS:
            return RawSample(
                pictures, item["messages"], item["kind"], item["answers"], item["source_id"]
            )
        return RawSample(
            images=pictures,
            messages=to_messages(item, len(pictures)),
            kind=kind_of(item, self.name),
            answers=scored_answers(item),
            source_id=id_of(item) or entry.key,
        )


def _caption(entry: _Entry, pictures: list[tuple[str, bytes]]) -> RawSample:
    if "txt" not in entry.members:
        raise SampleError("members", f"{entry.key}: neither json nor txt")
    try:
        text = _read(entry, "txt", MAX_RECORD_BYTES).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise SampleError("text_encoding", f"{entry.key}.txt: {error}") from error
    messages = [user(CAPTION_QUESTION, len(pictures)), assistant(text)]
    return RawSample(pictures, messages, Webdataset.name, [], entry.key)


def _read(entry: _Entry, extension: str, limit: int) -> bytes:
    offset, size = entry.members[extension]
    if size > limit:
        raise SampleError("member_bytes", f"{entry.key}.{extension}: {size} bytes, limit {limit}")
    descriptor = _open(entry.path)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise UserError(f"{entry.path}: shorter than when it was opened; build it again")
    return data


def _open(path: Path) -> int:
    """Open a regular file only: a FIFO would block for ever, a link could lead anywhere."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; shards are files, not links") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; shards are files")
    return descriptor


def _natural(name: str) -> tuple[int | str, ...]:
    """Sort names by their numbers: img2 before img10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _scan(path: Path) -> Iterator[_Entry]:
    """The shard's keys, from its headers alone. Raises UserError naming shard and member."""
    entry, seen, end = None, set(), 0
    try:
        with os.fdopen(_open(path), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, extension = _checked_name(path, member)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                if entry is None or key != entry.key:
                    if key in seen:
                        raise UserError(f"{path}: {member.name!r}: key {key!r} is in two places")
                    seen.add(key)
                    if entry is not None:
                        yield entry
                    entry = _Entry(path, key)
                if extension in entry.members:
                    raise UserError(f"{path}: {member.name!r}: comes twice")
                entry.members[extension] = (member.offset_data, member.size)
            _require_tail(path, file, end)
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a plain tar ({error}); unpack compression first") from None
    if entry is not None:
        yield entry


def _require_tail(path: Path, file: IO[bytes], end: int) -> None:
    """Require that a tar ends in two zero blocks, with only zeros behind them.

    tarfile takes damage between members for the end, and stops before an appended tar.
    """
    file.seek(end)
    length = 0
    while block := file.read(2**20):
        if block.count(0) != len(block):
            raise UserError(f"{path}: cut off, damaged or continued at byte {end}; fetch it again")
        length += len(block)
    if length < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{path}: cut off at byte {end}; fetch it again")


def _checked_name(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    """(key, extension) as webdataset splits them: at the first dot of the base name."""
    name = member.name
    # a sparse member counts as regular to tarfile, and its bytes are not its content
    is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not (is_plain or member.isdir()):
        raise UserError(f"{path}: {name!r} is sparse, a link or a device; use plain files")
    if member.size < 0:
        raise UserError(f"{path}: {name!r}: a size of {member.size}; fetch it again")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or "\\" in name:
        raise UserError(f"{path}: {name!r} leads out of the shard")
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    if member.isreg() and (not stem or not _EXTENSION.fullmatch(extension)):
        allowed = ", ".join([*IMAGE_FORMATS, "json", "txt"])
        raise UserError(f"{path}: {name!r}: only {allowed} members are read, nothing else")
    return f"{folder}/{stem}" if folder else stem, extension
