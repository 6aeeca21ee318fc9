"""Reads a sample by its number: byte range, crc32, webdataset's own tar parser, decoding.

Random access lets the plan decide the order. Every defect becomes a BadSample. So does a
StopIteration, which would end a DataLoader's epoch early without an error.
"""

import io
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from genrecal_ds.data.decode import SampleError, decode_image, decode_record
from genrecal_ds.data.index import Shard, ShardIndex
from genrecal_ds.data.store import StoreError

MAX_OPEN_SHARDS = 64  # per process; far below the usual limit of 1024 descriptors

# What tarfile and webdataset raise on damaged tars.
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, AssertionError, RuntimeError)

_RANGE_FIELDS = ("shard", "offset", "length", "crc32")

TarStages = tuple[Callable[..., Iterator[Any]], Callable[..., Iterator[dict[str, Any]]]]


@dataclass(frozen=True)
class Sample:
    """One conversation; images are RGB, upright, in the order of the image parts."""

    key: str
    images: list[Image.Image]
    messages: list[dict[str, Any]]
    kind: str
    answers: list[str]
    source_id: str  # what the source calls it; never a name of ours


class BadSample(Exception):
    """A sample that cannot be read; the message names shard, number, key and reason.

    One positional argument only: DataLoader re-raises a worker's error from its text.
    """

    def __init__(self, message: str, *, shard: str = "", key: str = "") -> None:
        super().__init__(message)
        self.shard = shard
        self.key = key


def tar_stages() -> TarStages:
    """webdataset's (tar_file_expander, group_by_keys), with its unpickling and pipes locked.

    Imported late: webdataset imports torch, and commands should start fast.
    """
    import webdataset.utils
    from webdataset.tariterators import group_by_keys, tar_file_expander

    webdataset.utils.enforce_security = True  # a second lock: we call neither gopen nor .decode()
    return tar_file_expander, group_by_keys


class ShardReader:
    """Reads samples of an index in any order, from any process.

    Files are opened at first use and again after a fork or in a spawned worker.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._ranges = index.records[list(_RANGE_FIELDS)]
        self._expand, self._group = tar_stages()  # before a fork, so workers share the import
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Sample number i, 0 <= i < len. Raises BadSample, or IndexError (also for -1 slots)."""
        (sample,) = self.read_many([i])
        if isinstance(sample, BadSample):
            raise sample
        return sample

    def read_many(self, numbers: Sequence[int]) -> list["Sample | BadSample"]:
        """Read the samples of these numbers, in their order; a bad one comes as its BadSample."""
        samples: list[Sample | BadSample] = []
        for i, parsed in zip(numbers, self._parse_many(numbers), strict=True):
            if isinstance(parsed, BadSample):
                samples.append(parsed)
                continue
            try:
                samples.append(self._decode(parsed, int(self.index.records["num_images"][i])))
            except SampleError as error:
                samples.append(self._bad(i, self._shard(i), parsed["__key__"], error))
        return samples

    def members(self, i: int) -> dict[str, bytes]:
        """Sample number i undecoded: extension -> bytes. Raises as read does."""
        (members,) = self.members_many([i])
        if isinstance(members, BadSample):
            raise members
        return members

    def members_many(self, numbers: Sequence[int]) -> list["dict[str, bytes] | BadSample"]:
        """The undecoded samples of these numbers, in their order."""
        return [
            parsed
            if isinstance(parsed, BadSample)
            else {name: value for name, value in parsed.items() if not name.startswith("__")}
            for parsed in self._parse_many(numbers)
        ]

    def tar_bytes(self, i: int) -> bytes:
        """The tar blocks of sample number i, as they lie in its shard. Raises as read does."""
        return self._checked_range(i)[0]

    def close(self) -> None:
        """Close the descriptors of this process; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.index,)

    def __del__(self) -> None:
        # after a fork the numbers belong to the parent's reader as well: closing our copies is safe
        if getattr(self, "_files", None):
            self.close()

    def _checked_range(self, i: int) -> tuple[bytes, Shard]:
        if not 0 <= i < len(self.index):
            raise IndexError(f"sample {i} of {len(self.index)}")
        # one conversion to Python: single fields of a numpy record cost a microsecond each
        number, offset, length, crc32 = self._ranges[i].item()
        shard, data = self.index.shards[number], b""
        try:
            data = self._read_range(number, offset, length)
            if (actual := zlib.crc32(data)) != crc32:
                raise SampleError("crc32", f"is {actual:08x}, not {crc32:08x}")
        except SampleError as error:
            raise self._bad(i, shard, _header_key(data) or "?", error) from error
        return data, shard

    def _shard(self, i: int) -> Shard:
        return self.index.shards[int(self.index.records["shard"][i])]

    def _parse_many(self, numbers: Sequence[int]) -> list["dict[str, Any] | BadSample"]:
        """Parse ranges of whole samples together: one behind the other they are a tar.

        A parser for every sample would cost as much as reading it. Where the joint result is not
        one sample per range, each range is parsed alone, so that the damaged one is named.
        """
        ranges: list[tuple[int, Shard, bytes] | BadSample] = []
        for i in numbers:
            try:
                data, shard = self._checked_range(i)
                ranges.append((i, shard, data))
            except BadSample as error:
                ranges.append(error)
        sound = [item for item in ranges if not isinstance(item, BadSample)]
        joint: Iterator[dict[str, Any]] = iter(())
        if len(sound) > 1:
            joint = iter(self._parse_joint([data for _, _, data in sound]))
        parsed: list[dict[str, Any] | BadSample] = []
        for item in ranges:
            if isinstance(item, BadSample):
                parsed.append(item)
                continue
            i, shard, data = item
            try:
                parsed.append(next(joint, None) or self._parse(shard, data))
            except SampleError as error:
                parsed.append(self._bad(i, shard, _header_key(data), error))
        return parsed

    def _parse_joint(self, ranges: list[bytes]) -> list[dict[str, Any]]:
        """One parsed sample per range, or none at all where that is in doubt."""
        if not all(data[257:262] == b"ustar" for data in ranges):
            return []
        try:
            files = self._expand([{"url": "", "stream": _Chain(ranges)}])
            samples = list(self._group(files))
        except TAR_ERRORS:
            return []
        keys = [_header_key(data) for data in ranges]
        return samples if [sample["__key__"] for sample in samples] == keys else []

    def _bad(self, i: int, shard: Shard, key: str, error: SampleError) -> BadSample:
        message = f"{self.index.directory / shard.name}: sample {i}, key {key}: {error}"
        return BadSample(message, shard=shard.name, key=key)

    def _read_range(self, shard_number: int, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._descriptor(shard_number), length, offset)
        except (OSError, StoreError) as error:
            raise SampleError("shard_unreadable", str(error)) from error
        if len(data) != length:
            raise SampleError("shard_truncated", f"{len(data)} bytes at {offset}, not {length}")
        return data

    def _descriptor(self, shard_number: int) -> int:
        if self._process != os.getpid():
            # Descriptors inherited over a fork are closed, not shared: some network file systems
            # tie locks and read-ahead to the open file description.
            self.close()
            self._process = os.getpid()
        if shard_number in self._files:
            self._files.move_to_end(shard_number)
            return self._files[shard_number]
        if len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        shard = self.index.shards[shard_number]
        descriptor = self.index.store.open(shard.name, shard.sha256)
        self._files[shard_number] = descriptor
        return descriptor

    def _parse(self, shard: Shard, data: bytes) -> dict[str, Any]:
        """Tar bytes of one sample -> {"__key__": str, extension: bytes}."""
        if data[257:262] != b"ustar":
            # tarfile would unpack gz, bz2 or xz by itself, and they have no size limit
            raise SampleError("tar", "does not start with a plain tar header")
        try:
            files = self._expand([{"url": shard.name, "stream": io.BytesIO(data)}])
            samples = list(self._group(files))
        except TAR_ERRORS as error:
            raise SampleError("tar", f"{type(error).__name__}: {error}"[:200]) from error
        if len(samples) != 1:
            raise SampleError("tar", f"byte range holds {len(samples)} samples, not 1")
        return samples[0]

    def _decode(self, members: dict[str, Any], num_images: int) -> Sample:
        names = [name for name in members if not name.startswith("__")]
        if "json" not in names:
            raise SampleError("members", f"no json among {names}")
        record = decode_record(members["json"])
        by_number = {name.split(".")[0]: name for name in names if name != "json"}
        if record.num_images != num_images or len(names) != num_images + 1:
            raise SampleError(
                "image_count", f"{record.num_images} image parts, {names}, index: {num_images}"
            )
        images = []
        for number in range(num_images):
            if (name := by_number.get(str(number))) is None:
                raise SampleError("members", f"no image {number} among {names}")
            images.append(decode_image(members[name], name.split(".", 1)[1]))
        key = members["__key__"]
        return Sample(key, images, record.messages, record.kind, record.answers, record.source_id)


class _Chain:
    """Presents byte ranges as one stream, without a joint copy."""

    def __init__(self, ranges: Sequence[bytes]) -> None:
        self._ranges = iter(ranges)
        self._data, self._position = b"", 0

    def read(self, size: int) -> bytes:
        """Up to size bytes, never across a range's end; b"" behind the last."""
        if self._position == len(self._data):
            self._data, self._position = next(self._ranges, b""), 0
        start = self._position
        self._position = min(start + size, len(self._data))
        return self._data[start : self._position]


def _header_key(data: bytes) -> str:
    """The key as the first header spells it, for error messages: the bytes may be damaged."""
    name = data[:100].split(b"\0")[0].split(b".")[0].decode("ascii", "backslashreplace")
    return name.encode("unicode_escape").decode("ascii")
