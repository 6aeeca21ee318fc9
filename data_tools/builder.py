"""Makes the shards of an opened source: every sample checked, in parallel, resumable.

Shard k holds the good rows of the source's rows [k * shard_size, (k + 1) * shard_size). So any
number of processes can make the shards in any order, and the bytes are always the same. A finished
shard leaves a part file. A build that was killed goes on with the shards that have no part file.
"""

import dataclasses
import fcntl
import gc
import json
import multiprocessing
import os
import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.sources import RawSample, Source
from data_tools.writer import (
    CheckedSample,
    ShardFile,
    ShardPart,
    publish,
    publish_folder,
    shard_path,
    temporary,
    write_json,
)
from genrecal_ds.data.decode import SampleError, decode_image, decode_record
from genrecal_ds.data.index import MANIFEST_NAME, ShardIndex, file_sha256, read_manifest
from genrecal_ds.errors import UserError

REJECTS_NAME = "rejects.jsonl"
PARTS_NAME = ".parts"
PART_SCHEMA = 1  # raise it when the same row would be checked or written differently
_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]*")
_OURS = re.compile(
    r"\.parts|(shard-\d{6,}\.tar|index\.npy|rejects\.jsonl)"
    r"|\.(shard-\d{6,}\.tar|index\.npy|rejects\.jsonl|manifest\.json)\.tmp"
)


@dataclass
class BuildReport:
    """What a build did: the accepted samples, and the rejected samples by reason."""

    num_accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def reject_rate(self) -> float:
        return self.num_rejected / max(1, self.num_rejected + self.num_accepted)

    def add(self, part: ShardPart) -> None:
        """Count one shard."""
        self.num_accepted += len(part.records)
        self.rejected.update(reject["reason"] for reject in part.rejects)


def build(
    source: Source,
    out: Path,
    *,
    arguments: dict[str, Any],
    shard_size: int = 512,
    max_reject_rate: float = 0.01,
    num_workers: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
) -> BuildReport:
    """Write the source's checked samples to `out`; see the module's docstring.

    `arguments` goes into the manifest and, with the source's digest, identifies the build; the
    bytes depend on nothing else. advance is called with the number of rows done. The manifest is
    left out when more than max_reject_rate of the rows are bad. Raises UserError when no row is
    accepted, or when the folder holds another build.
    """
    identity = _identity(source, arguments, shard_size)
    out.mkdir(parents=True, exist_ok=True)
    with _claimed(out, identity) as parts_folder:
        numbers = range(-(-len(source) // shard_size))
        job = _Job(source, out, parts_folder, shard_size)
        unfinished = [number for number in numbers if not job.is_finished(number)]
        for part_rows in map(job.num_rows, sorted(set(numbers) - set(unfinished))):
            advance(part_rows)
        for number in job.run(unfinished, num_workers):
            advance(job.num_rows(number))
        parts = [job.read_part(number) for number in numbers]
        report = BuildReport()
        for part in parts:
            report.add(part)
        _write_rejects(out, parts)
        if report.num_accepted == 0:
            reasons = ", ".join(sorted(report.rejected)) or "the source has no rows"
            raise UserError(f"{out}: nothing to write ({reasons}); see {out / REJECTS_NAME}")
        if report.reject_rate <= max_reject_rate:
            publish_folder(out, parts, {**arguments, "source_digest": source.digest})
            shutil.rmtree(parts_folder)
    return report


def build_share(
    source: Source,
    out: Path,
    task: tuple[int, int],
    *,
    arguments: dict[str, Any],
    shard_size: int = 512,
    num_workers: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
) -> bool:
    """Make the shards of task (i, n): every n-th from i on. Other tasks may write beside it.

    Returns True when no shard is missing: a last call of `build` then writes the index.
    """
    out.mkdir(parents=True, exist_ok=True)
    identity = _identity(source, arguments, shard_size)
    with _claimed(out, identity, is_shared=True) as parts_folder:
        numbers = range(-(-len(source) // shard_size))
        job = _Job(source, out, parts_folder, shard_size)
        first, step = task
        unfinished = [n for n in numbers[first::step] if not job.is_finished(n)]
        for number in job.run(unfinished, num_workers):
            advance(job.num_rows(number))
        return all(job.part_path(number).is_file() for number in numbers)


def _identity(source: Source, arguments: dict[str, Any], shard_size: int) -> dict[str, Any]:
    """Return the facts in which a folder's build must be equal to be continued."""
    assert _NAME.fullmatch(source.name), f"{source.name!r} would be part of every key"
    return {
        **arguments, "source_digest": source.digest, "num_rows": len(source),
        "shard_size": shard_size, "part_schema": PART_SCHEMA,
    }  # fmt: skip


class Busy(UserError):
    """Another build is writing to the folder."""


class _Job:
    """Makes single shards; the children of a fork inherit it with the opened source."""

    def __init__(self, source: Source, out: Path, parts: Path, shard_size: int) -> None:
        self.source, self.out, self.parts, self.shard_size = source, out, parts, shard_size

    def num_rows(self, number: int) -> int:
        return min(self.shard_size, len(self.source) - number * self.shard_size)

    def part_path(self, number: int) -> Path:
        return self.parts / f"{number:06d}.json"

    def read_part(self, number: int) -> ShardPart:
        return ShardPart(**json.loads(self.part_path(number).read_text(encoding="utf-8")))

    def is_finished(self, number: int) -> bool:
        """True when the part file is there and its tar is what the part file says."""
        if not self.part_path(number).is_file():
            return False
        entry, path = self.read_part(number).entry, shard_path(self.out, number)
        return entry is None or (path.is_file() and file_sha256(path) == entry["sha256"])

    def run(self, numbers: Sequence[int], num_workers: int) -> Iterator[int]:
        """Make these shards, in any order; yields each number when its files are on disk."""
        if num_workers == 1 or len(numbers) <= 1:
            for number in numbers:
                self.make(number)
                yield number
            return
        global _job
        _job = self
        gc.freeze()  # or every collection in a child would copy the pages of the opened source
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_workers, context, _end_with_parent) as pool:
            futures = {pool.submit(_make, number): number for number in numbers}
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            except BrokenProcessPool:
                raise UserError(
                    f"{self.out}: a worker was killed (out of memory?); run it again to go on, "
                    "with fewer --workers"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                gc.unfreeze()

    def make(self, number: int) -> None:
        """Write one shard, then its part file."""
        start = number * self.shard_size
        rejects = []
        shard = ShardFile(shard_path(self.out, number))
        try:
            for row, raw in enumerate(
                self.source.rows(start, start + self.num_rows(number)), start
            ):
                try:
                    if isinstance(raw, SampleError):
                        raise raw
                    shard.append(check(raw, self.source.name, row))
                except SampleError as error:
                    source_id = str(raw.source_id) if isinstance(raw, RawSample) else ""
                    reject = {"row": row, "source_id": source_id, "reason": error.reason}
                    rejects.append({**reject, "detail": error.detail})
            part = shard.publish(rejects)
        finally:
            shard.close()
        write_json(self.part_path(number), dataclasses.asdict(part))


_job: _Job | None = None


def _end_with_parent() -> None:
    """End a worker with its parent: else it would wait for ever and keep the folder's lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _make(number: int) -> None:
    assert _job is not None, "the pool forks after _job is set"
    _job.make(number)


def check(raw: RawSample, source: str, row: int) -> CheckedSample:
    """Encode the record, decode everything as the reader will; raises SampleError."""
    record_json = {
        "messages": raw.messages,
        "kind": raw.kind,
        "answers": raw.answers,
        "source": source,
        "source_id": raw.source_id,
    }
    try:
        text = json.dumps(record_json, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError("text_encoding", f"lone surrogate: {error}"[:200]) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError("record_json", f"{type(error).__name__}: {error}"[:200]) from error
    record = decode_record(encoded)
    if record.num_images != len(raw.images):
        raise SampleError(
            "image_count", f"{record.num_images} image parts but {len(raw.images)} images"
        )
    members, sizes = [("json", encoded)], []
    for number, (extension, data) in enumerate(raw.images):
        sizes.append(decode_image(data, extension).size)
        members.append((f"{number}.{extension}", data))  # the source's bytes, never re-encoded
    return CheckedSample(f"{source}/{row:09d}", members, record.kind, record.text_bytes, sizes)


def is_finished(out: Path, arguments: dict[str, Any]) -> bool:
    """Return True for a sound folder of the same build. Raises UserError for another build's."""
    if not (out / MANIFEST_NAME).exists():
        return False
    recorded = read_manifest(out).get("build")
    _refuse_difference(out, recorded if isinstance(recorded, dict) else {}, arguments)
    ShardIndex.load(out)
    return True


def _refuse_difference(out: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in sorted(wanted.keys() | recorded.keys()):
        if wanted.get(key) != recorded.get(key):
            raise UserError(
                f"{out}: already built with {key}={recorded.get(key)!r}, asked for "
                f"{wanted.get(key)!r}; choose another --out or delete the folder"
            )


@contextmanager
def _claimed(out: Path, identity: dict[str, Any], is_shared: bool = False) -> Iterator[Path]:
    """Lock the parts folder of this build; refuse a folder that holds anything else.

    is_shared: tasks of one build lock out a whole build, not each other.
    """
    for path in sorted(out.iterdir()):
        if not _OURS.fullmatch(path.name) or path.is_dir() != (path.name == PARTS_NAME):
            raise UserError(f"{path}: not from an unfinished build; choose an empty or new --out")
    parts = out / PARTS_NAME
    parts.mkdir(exist_ok=True)
    descriptor = os.open(parts, os.O_RDONLY)
    try:
        try:
            lock = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"{out}: another build is writing here; wait for it") from None
        # through json, so that it compares equal to what a file gives back
        identity = json.loads(json.dumps(identity))
        stated = parts / "build.json"
        if not stated.is_file():
            # under a name of its own: several tasks may come to this line together
            own = parts / f".{socket.gethostname()}-{os.getpid()}.json.tmp"
            own.write_text(json.dumps(identity, indent=1), encoding="utf-8")
            os.replace(own, stated)
        _refuse_difference(out, json.loads(stated.read_text(encoding="utf-8")), identity)
        if not is_shared:  # else it may be another task's that is being written
            for path in [*out.glob(".*.tmp"), *parts.glob(".*.tmp")]:
                path.unlink()
        yield parts
    finally:
        os.close(descriptor)  # and with it the lock


def _write_rejects(out: Path, parts: Sequence[ShardPart]) -> None:
    path = out / REJECTS_NAME
    with temporary(path).open("w", encoding="utf-8") as file:
        for part in parts:
            file.writelines(json.dumps(reject) + "\n" for reject in part.rejects)
    publish(path)
