"""Sample number -> Sample: pread of its byte range, crc32, webdataset's own tar parser, decode.

Random access is what lets the plan decide the order. Every defect becomes a BadSample, also
StopIteration, which would end a DataLoader's epoch early without an error.
"""

import io
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
        data, shard = self._checked_range(i)
        try:
            num_images = int(self.index.records["num_images"][i])
            return self._decode(self._parse(shard, data), num_images)
        except SampleError as error:
            raise self._bad(i, shard, _header_key(data), error) from error

    def members(self, i: int) -> dict[str, bytes]:
        """Sample number i undecoded: extension -> bytes. Raises as read does."""
        data, shard = self._checked_range(i)
        try:
            parsed = self._parse(shard, data)
        except SampleError as error:
            raise self._bad(i, shard, _header_key(data), error) from error
        return {name: value for name, value in parsed.items() if not name.startswith("__")}

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
        record = dict(zip(_RANGE_FIELDS, self._ranges[i].item(), strict=True))
        shard, key = self.index.shards[record["shard"]], "?"
        try:
            data = self._read_range(record["shard"], record["offset"], record["length"])
            key = _header_key(data)
            if (crc32 := zlib.crc32(data)) != record["crc32"]:
                raise SampleError("crc32", f"is {crc32:08x}, not {record['crc32']:08x}")
        except SampleError as error:
            raise self._bad(i, shard, key, error) from error
        return data, shard

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


def _header_key(data: bytes) -> str:
    """The key as the first header spells it, for error messages: the bytes may be damaged."""
    name = data[:100].split(b"\0")[0].split(b".")[0].decode("ascii", "backslashreplace")
    return name.encode("unicode_escape").decode("ascii")
