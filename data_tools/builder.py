"""Makes the shards of an opened source: every sample checked, in parallel, resumable.

Shard k holds the good rows of the source's rows [k * shard_size, (k + 1) * shard_size). So any
number of processes can make the shards in any order, and the bytes are always the same. A finished
shard leaves a part file. A build that was killed goes on with the shards that have no part file.
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.job import Job, changed_rejects
from data_tools.report import SECTIONS, BuildReport
from data_tools.sources import Source
from data_tools.writer import ShardPart, publish, publish_folder, shard_path, temporary, write_json
from genrecal_ds.data.index import MANIFEST_NAME, ShardIndex, read_manifest
from genrecal_ds.errors import UserError

REJECTS_NAME = "rejects.jsonl"
PARTS_NAME = ".parts"
PART_SCHEMA = 2  # raise it when the same row would be checked or written differently
_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]*")
_OURS = re.compile(
    r"\.parts|(shard-\d{6,}\.tar|index\.npy|rejects\.jsonl)"
    r"|\.(shard-\d{6,}\.tar|index\.npy|rejects\.jsonl|manifest\.json)\.tmp"
)


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
        job = Job(source, out, parts_folder, shard_size)
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
            facts = {**arguments, "source_digest": source.digest}
            publish_folder(out, parts, facts, report.stated())
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
        job = Job(source, out, parts_folder, shard_size)
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


def is_finished(out: Path, arguments: dict[str, Any]) -> bool:
    """Return True for a sound folder of the same build. Raises UserError for another build's."""
    if not (out / MANIFEST_NAME).exists():
        return False
    recorded = read_manifest(out).get("build")
    _refuse_difference(out, recorded if isinstance(recorded, dict) else {}, arguments)
    ShardIndex.load(out)
    return True


def read_rejects(out: Path) -> list[dict[str, Any]]:
    """The rejects of a finished folder. Raises UserError for a file that is not a build's."""
    path = out / REJECTS_NAME
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; delete {out} and build it again") from None


def changed_of(out: Path) -> list[dict[str, Any]]:
    """The rejects of a finished folder whose picture files have changed since."""
    return changed_rejects(read_rejects(out))


def reopen(source: Source, out: Path, *, arguments: dict[str, Any], shard_size: int) -> None:
    """Make a finished folder an unfinished one again: what `build` then changes is its rejects.

    The parts are restored from index and rejects before the manifest goes, so that a kill at any
    moment leaves either a finished folder or one that `build` goes on with.
    """
    manifest, index, rejects = read_manifest(out), ShardIndex.load(out), read_rejects(out)
    parts = out / PARTS_NAME
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    entries = {entry["name"]: (n, entry) for n, entry in enumerate(manifest["shards"])}
    job = Job(source, out, parts, shard_size)
    for number in range(-(-len(source) // shard_size)):
        place, entry = entries.get(shard_path(out, number).name, (-1, None))
        records = index.records[index.records["shard"] == place].copy()
        kinds = dict.fromkeys(records["kind"].tolist())  # in the order of the shard's samples
        codes = {code: own for own, code in enumerate(kinds)}
        records["kind"] = [codes[code] for code in records["kind"].tolist()]
        records["shard"] = 0
        rows = range(number * shard_size, number * shard_size + job.num_rows(number))
        part = ShardPart(
            entry,
            [list(record.item()) for record in records],
            [index.kinds[code] for code in kinds],
            [reject for reject in rejects if reject["row"] in rows],
            # the counts of all shards are known together only
            {name: manifest[name] for name in SECTIONS if name in manifest and number == 0},
        )
        write_json(job.part_path(number), dataclasses.asdict(part))
    identity = _identity(source, arguments, shard_size)
    (parts / "build.json").write_text(json.dumps(identity, indent=1), encoding="utf-8")
    (out / MANIFEST_NAME).unlink()


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
