"""Makes single shards: every row checked by the reader's own functions, then written.

A shard that was made before keeps its samples. Of its rejects only those are tried again whose
files have changed since.
"""

import dataclasses
import gc
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.report import SECTIONS
from data_tools.sources import Evidence, Picture, RawSample, Rejected, Source
from data_tools.sources.files import evidence_of
from data_tools.writer import CheckedSample, ShardFile, ShardPart, shard_path, write_json
from genrecal_ds.data.decode import SampleError, decode_image, decode_record
from genrecal_ds.data.index import INDEX_DTYPE, file_sha256
from genrecal_ds.errors import UserError


class Job:
    """Makes single shards; the children of a fork inherit it with the opened source."""

    def __init__(self, source: Source, out: Path, parts: Path, shard_size: int) -> None:
        self.source, self.out, self.parts, self.shard_size = source, out, parts, shard_size

    def num_rows(self, number: int) -> int:
        return min(self.shard_size, len(self.source) - number * self.shard_size)

    def part_path(self, number: int) -> Path:
        return self.parts / f"{number:06d}.json"

    def read_part(self, number: int) -> ShardPart:
        return ShardPart(**json.loads(self.part_path(number).read_text(encoding="utf-8")))

    def is_whole(self, number: int) -> bool:
        """True when the part file is there and its tar is what the part file says."""
        if not self.part_path(number).is_file():
            return False
        entry, path = self.read_part(number).entry, shard_path(self.out, number)
        return entry is None or (path.is_file() and file_sha256(path) == entry["sha256"])

    def is_finished(self, number: int) -> bool:
        """True when the shard is whole and no reject of it would be judged anew."""
        return self.is_whole(number) and not changed_rejects(self.read_part(number).rejects)

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
        """Write one shard, then its part file; of a whole one, try again what has changed."""
        start = number * self.shard_size
        rows = range(start, start + self.num_rows(number))
        path = shard_path(self.out, number)
        before = self.read_part(number) if self.is_whole(number) else None
        made = _Made(ShardFile(path), self.source.name)
        try:
            if before is None:
                for row, raw in zip(rows, self.source.rows(start, rows.stop), strict=True):
                    made.judge(row, raw)
            else:
                self._retry(before, path, rows, made)
            part = made.shard.publish(made.rejects)
        finally:
            made.shard.close()
        stated = {section: dict(values) for section, values in made.counts.items() if values}
        write_json(self.part_path(number), dataclasses.asdict(replace(part, counts=stated)))

    def _retry(self, before: ShardPart, path: Path, rows: range, made: "_Made") -> None:
        """Copy the samples of a shard as they are, and judge its changed rejects."""
        rejected = {reject["row"]: reject for reject in before.rejects}
        changed = {reject["row"] for reject in changed_rejects(before.rejects)}
        made.add_counts(before.counts)
        accepted = zip((row for row in rows if row not in rejected), before.records, strict=True)
        records = dict(accepted)
        data = path.read_bytes() if records else b""
        for row in rows:
            if row in records:
                record = dict(zip(INDEX_DTYPE.names or (), records[row], strict=True))
                begin, length = record["offset"], record["length"]
                kind = before.kinds[record["kind"]]
                made.shard.append_bytes(data[begin : begin + length], kind, record)
            elif row in changed:
                (raw,) = self.source.rows(row, row + 1)
                made.judge(row, raw)
            else:
                made.rejects.append(rejected[row])


class _Made:
    """What has been made of one shard."""

    def __init__(self, shard: ShardFile, source: str) -> None:
        self.shard, self.source = shard, source
        self.rejects: list[dict[str, Any]] = []
        self.counts: dict[str, Counter[str]] = {section: Counter() for section in SECTIONS}

    def judge(self, row: int, raw: RawSample | SampleError) -> None:
        """Write a row's sample, or its rejection."""
        try:
            if isinstance(raw, SampleError):
                raise raw
            self.shard.append(check(raw, self.source, row))
        except SampleError as error:
            self.rejects.append(_reject(row, raw, error))
            return
        converted = {p.converted for p in raw.images if isinstance(p, Picture) and p.converted}
        for section, keys in zip(
            SECTIONS, (raw.read, raw.unread, raw.blank, converted), strict=True
        ):
            self.counts[section].update(set(keys))

    def add_counts(self, counts: dict[str, dict[str, int]]) -> None:
        for section, values in counts.items():
            self.counts[section].update(values)


def _reject(row: int, raw: RawSample | SampleError, error: SampleError) -> dict[str, Any]:
    """A line of rejects.jsonl; inputs are the picture files that the verdict rests on."""
    source_id, inputs = "", list[Evidence]()
    if isinstance(raw, RawSample):
        source_id = str(raw.source_id)
        inputs = [p.evidence for p in raw.images if isinstance(p, Picture) and p.evidence]
    elif isinstance(error, Rejected):
        source_id, inputs = error.source_id, list(error.inputs)
    reject = {"row": row, "source_id": source_id, "reason": error.reason, "detail": error.detail}
    return {**reject, "inputs": [list(entry) for entry in inputs]} if inputs else reject


def changed_rejects(rejects: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rejects whose picture files came, went or changed since the verdict."""
    return [
        reject
        for reject in rejects
        if any(
            evidence_of(path) != (path, size, time) for path, size, time in reject.get("inputs", ())
        )
    ]


_job: Job | None = None


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
