"""Reads other people's webdataset shards, each checked whole before its first sample.

webdataset ends a damaged tar in silence, merges keys with dots, and its decoder unpickles. This
module reads pictures, json and txt. Other members (.npy, .cls, a pickle, dot files) are counted by
name and never opened; one that looks like content ends the build, as an unread key does. It unpacks
nothing and runs nothing.
"""

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_tools.sources import Picture, RawSample, RowSource
from data_tools.sources.files import linked_folder, with_extension
from data_tools.sources.items import TEACHING_KEYS, Items, named
from data_tools.sources.keys import cleaned, is_blank
from data_tools.sources.pictures import PictureReader
from data_tools.sources.splits import files_of
from genrecal_ds.data.decode import (
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    MAX_RECORD_BYTES,
    OTHER_FORMATS,
    RECORD_KEYS,
    SampleError,
    parse_json,
)
from genrecal_ds.data.index import file_sha256
from genrecal_ds.errors import UserError

PICTURES = (*IMAGE_FORMATS, *OTHER_FORMATS, "tif", "heif")
# 0.jpg, img1.jpg: more pictures of a key. Anything else (seg.png, meta.json) would be guessed at.
_EXTENSION = re.compile(rf"json|txt|([a-z_-]*[0-9]+\.)?({'|'.join(PICTURES)})")
_CONTENT = re.compile(rf"(.*\.)?({'|'.join(PICTURES)}|txt|json|mp4|wav|flac|mp3)")


def open_source(
    path: str, *, split: str | None = None, ignore: Sequence[str] = (), links: str | None = None
) -> "Webdataset":
    """path: a .tar, or a folder of them. Members: pictures, and a json or a txt (caption) a key.

    split: of a folder whose files name several. ignore: keys or members to leave out. links: a
    folder into which links to shards may lead. Raises UserError for a shard that is compressed,
    cut off, or holds a link, a device, a name that leads elsewhere, a key in two places or a member
    twice. Pictures of a key are its jpg, png, ... or numbered ones (0.jpg, img1.jpg), in the order
    in which its json names them, else in natural order.
    """
    return Webdataset(Path(path), split, ignore, links)


@dataclass
class _Entry:
    """One key's members: extension -> (offset, size) in the shard."""

    path: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


class Webdataset(RowSource):
    """Rows are the keys, shards by name."""

    name = "webdataset"

    def __init__(
        self, path: Path, split: str | None, ignore: Sequence[str], links: str | None
    ) -> None:
        shards = files_of(path, ".tar", split)
        self._roots = linked_folder(links)
        self._ignored = frozenset(ignore)
        self._entries = [
            entry for shard in shards for entry in _scan(shard, self._roots, self._ignored)
        ]
        self._items = Items(self.name, str(path), PictureReader(None), ignore)
        hashes = [f"{shard.name} {file_sha256(shard)}" for shard in shards]
        self.digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def row(self, number: int) -> RawSample:
        entry = self._entries[number]
        with named(entry.key):
            names = [name for name in entry.members if name.rsplit(".", 1)[-1] in PICTURES]
            pictures = [
                (f"{entry.key}.{name}", with_extension(self._read(entry, name, MAX_IMAGE_BYTES)))
                for name in sorted(names, key=_natural)
            ]
            item: Any = {}
            if "json" in entry.members:
                item = parse_json(self._read(entry, "json", MAX_RECORD_BYTES), allow_nan=True)
            if not isinstance(item, dict):
                raise SampleError("row", f"{item!r:.80} is not an object")
            if item.keys() == RECORD_KEYS:
                images: list[tuple[str, bytes]] = [picture for _, picture in pictures]
                return RawSample(
                    images, item["messages"], item["kind"], item["answers"], item["source_id"]
                )
            item = self._with_caption(entry, item)
        return self._sample(entry, item, pictures)

    def _with_caption(self, entry: _Entry, item: dict[str, Any]) -> dict[str, Any]:
        """The item with the text beside it: a caption where the item itself teaches nothing."""
        if "txt" not in entry.members or "txt" in self._ignored:
            if not item:
                more = f", only {', '.join(entry.unread)}" if entry.unread else ""
                raise SampleError("members", f"{entry.key}: neither json nor txt{more}")
            return item
        try:
            text = self._read(entry, "txt", MAX_RECORD_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError("text_encoding", f"{entry.key}.txt: {error}") from error
        if (TEACHING_KEYS - {"caption"}) & item.keys():
            return {**item, "txt": text}
        if is_blank(text):
            raise SampleError("empty_answer", f"{entry.key}.txt holds no text: {text!r:.40}")
        # img2dataset's json holds the download's facts, and the caption once more
        own_keys = ("caption", "id", "kind", "source", "data_source")
        facts = {key: value for key, value in item.items() if key not in own_keys}
        own = item.get("caption")
        if isinstance(own, str) and cleaned(own) != cleaned(text):
            facts["json caption"] = own
        return {**facts, "caption": text}

    def _sample(
        self, entry: _Entry, item: dict[str, Any], pictures: list[tuple[str, Picture]]
    ) -> RawSample:
        return self._items.sample(item, members=pictures, unread=entry.unread, default_id=entry.key)

    def _read(self, entry: _Entry, extension: str, limit: int) -> bytes:
        offset, size = entry.members[extension]
        if size > limit:
            raise SampleError(
                "member_bytes", f"{entry.key}.{extension}: {size} bytes, limit {limit}"
            )
        descriptor = _open(entry.path, self._roots)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise UserError(f"{entry.path}: shorter than when it was opened; build it again")
        return data


def _open(path: Path, roots: Sequence[Path] = ()) -> int:
    """Open a regular file only: a FIFO would block for ever, a link could lead anywhere."""
    if path.is_symlink() and any(path.resolve().is_relative_to(root) for root in roots):
        path = path.resolve()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; shards are files, not links; links of "
            "a hub's cache are followed where --allow-links names the folder they lead to"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; shards are files")
    return descriptor


def _natural(name: str) -> tuple[int | str, ...]:
    """Sort names by their numbers: img2 before img10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _scan(path: Path, roots: Sequence[Path], ignored: frozenset[str]) -> Iterator[_Entry]:
    """The shard's keys, from its headers alone. Raises UserError naming shard and member."""
    entries: dict[str, _Entry] = {}
    skipped: list[tuple[str, str]] = []
    current, end = None, 0
    try:
        with (
            os.fdopen(_open(path, roots), "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                key, extension = _checked_name(path, member)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                if not key or not _EXTENSION.fullmatch(extension) or extension in ignored:
                    _require_no_content(path, member.name, key, extension, ignored)
                    skipped.append((key, extension))
                    continue
                if key != current and key in entries:
                    raise UserError(f"{path}: {member.name!r}: key {key!r} is in two places")
                current, entry = key, entries.setdefault(key, _Entry(path, key))
                if extension in entry.members:
                    raise UserError(f"{path}: {member.name!r}: comes twice")
                entry.members[extension] = (member.offset_data, member.size)
            _require_tail(path, file, end)
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a plain tar ({error}); unpack compression first") from None
    for key, extension in skipped:
        # a key of unread members alone is no sample: its members are counted with another's
        entry = entries.get(key) or next(iter(entries.values()), _Entry(path, key))
        entry.unread.append(f".{extension}" if key else "dot files")
    yield from entries.values()


def _require_no_content(
    path: Path, name: str, key: str, extension: str, ignored: frozenset[str]
) -> None:
    """Refuse an unread member that holds a picture or a text, as an unread key is refused."""
    if key and _CONTENT.fullmatch(extension) and extension not in ignored:
        raise UserError(
            f"{path}: {name!r} looks like content and is not read; name pictures 0.jpg, 1.jpg, "
            f"or leave it out with --ignore {extension}"
        )


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
    """(key, extension) as webdataset splits them: at the first dot; no key for a dot file."""
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
    # a dot file has no key: macOS leaves ._0001.png beside 0001.png
    key = f"{folder}/{stem}" if folder and stem else stem
    return key, extension.lower()
