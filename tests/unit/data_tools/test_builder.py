"""The builder: reproducible bytes, every defect a reason, no half-finished folder looks whole."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools import build as build_module
from data_tools.build import main
from data_tools.builder import build
from data_tools.inspect import main as inspect
from data_tools.sources import RawSample, Rows
from genrecal_ds.console.text import printable
from genrecal_ds.data.decode import SampleError
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

Raw = Callable[[int, int], RawSample]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_arguments_same_bytes(built: Path, raw: Raw, tmp_path: Path) -> None:
    samples = Rows("unit", [raw(number, number % 3) for number in range(23)])
    build(samples, tmp_path / "again", arguments={"seed": 0}, shard_size=8)
    assert contents(tmp_path / "again") == contents(built)
    names = {"manifest.json", "index.npy", "rejects.jsonl"}
    assert contents(built).keys() == names | {f"shard-{i:06d}.tar" for i in range(3)}


def test_index_offsets_are_the_tars(built: Path) -> None:
    index = ShardIndex.load(built)
    for number, shard in enumerate(index.shards):
        with tarfile.open(built / shard.name) as tar:
            first = {m.name.split(".")[0]: m for m in reversed(tar.getmembers())}
            assert all(m.mtime == 0 and m.uid == 0 and m.isreg() for m in tar.getmembers())
        offsets = sorted(member.offset for member in first.values())
        records = index.records[index.records["shard"] == number]
        assert records["offset"].tolist() == offsets
        assert (records["offset"] + records["length"]).tolist()[:-1] == offsets[1:]


def spoil(sample: RawSample, reason: str) -> RawSample:
    user, assistant = sample.messages
    changes: dict[str, dict[str, Any]] = {
        "image_count": {"images": []},
        "image_format": {"images": [("bmp", sample.images[0][1])]},
        "image_decode": {"images": [("png", sample.images[0][1][:50])]},
        "last_turn": {"messages": [assistant, user]},
        "no_assistant": {"messages": [user]},
        "messages": {"messages": []},
        "text_encoding": {"source_id": "\ud800"},
        "record_json": {"source_id": float("nan")},
        "string": {"kind": ""},
    }
    return dataclasses.replace(sample, **changes[reason])


REASONS = (
    "image_count image_format image_decode last_turn no_assistant messages text_encoding "
    "record_json string"
).split()


def test_each_defect_has_its_reason(raw: Raw, tmp_path: Path) -> None:
    bad = [spoil(raw(number, 1), reason) for number, reason in enumerate(REASONS)]
    good = [raw(number, 1) for number in range(100, 103)]
    out = tmp_path / "out"
    report = build(Rows("s", [*bad, *good]), out, arguments={}, max_reject_rate=0.9)
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == REASONS
    assert [line["row"] for line in lines] == list(range(len(REASONS)))
    assert report.num_accepted == 3 and report.rejected == dict.fromkeys(REASONS, 1)
    index = ShardIndex.load(out)
    assert len(index) == 3
    assert ShardReader(index).read(0).key == f"s/{len(REASONS):09d}", "a key is the source's row"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rejected"] == dict.fromkeys(sorted(REASONS), 1)
    assert manifest["samples_per_kind"] == {"one": 3}


@pytest.fixture
def command(raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """main() with a source of 50 samples of which --seed are bad."""

    def source(path: str, *, seed: int = 0) -> Rows:
        samples = [raw(number, 1) for number in range(50)]
        return Rows("s", [spoil(s, "messages") if i < seed else s for i, s in enumerate(samples)])

    monkeypatch.setitem(build_module.FORMATS, "digits", source)

    def run(*options: str, out: str = "out") -> int:
        place = ["--out", str(tmp_path / out)] if ":" not in out else ["--out", out]
        return main(["digits", "--format", "digits", *place, *options])

    return run


def test_reject_rate(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("--seed", "1") == 1
    assert not (tmp_path / "out" / "manifest.json").exists(), "nothing may train on it"
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 1
    assert command("--seed", "1", "--max-reject-rate", "0.02") == 0
    assert len(ShardIndex.load(tmp_path / "out")) == 49


def test_all_rejected_and_empty(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--seed", "50", "--max-reject-rate", "1") == 2
    assert "nothing to write (messages)" in capsys.readouterr().err
    with pytest.raises(UserError, match="the source has no rows"):
        build(Rows("s", []), tmp_path / "empty", arguments={})
    assert not (tmp_path / "empty" / "manifest.json").exists()


def test_existing_folder(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--shard-size", "20") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert command("--shard-size", "20") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert command("--shard-size", "21") == 2
    assert "built with shard_size=20, asked for 21" in capsys.readouterr().err
    (tmp_path / "out" / "shard-000001.tar").unlink()
    assert command("--shard-size", "20") == 2
    assert "shard-000001.tar: missing" in capsys.readouterr().err


class Interrupted(Rows):
    """Stops the build at row 10 as Ctrl-C does."""

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        for number, sample in enumerate(super().rows(start, stop), start):
            if number == 10:
                raise KeyboardInterrupt
            yield sample


@pytest.mark.parametrize("num_workers", [1, 3])
def test_interrupted_build_goes_on(built: Path, raw: Raw, tmp_path: Path, num_workers: int) -> None:
    samples = [raw(number, number % 3) for number in range(23)]
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(Interrupted("unit", samples), out, arguments={"seed": 0}, shard_size=8)
    assert (out / "shard-000000.tar").exists() and (out / ".shard-000001.tar.tmp").exists()
    with pytest.raises(UserError, match="build is not finished"):
        ShardIndex.load(out)
    done = (out / "shard-000000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="built with seed=0, asked for 1"):
        build(Rows("unit", samples), out, arguments={"seed": 1}, shard_size=8)
    arguments = {"seed": 0}
    build(Rows("unit", samples), out, arguments=arguments, shard_size=8, num_workers=num_workers)
    assert contents(out) == contents(built)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == done, "a finished shard is kept"


def test_a_finished_shard_that_changed_is_made_again(built: Path, raw: Raw, tmp_path: Path) -> None:
    samples = [raw(number, number % 3) for number in range(23)]
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(Interrupted("unit", samples), out, arguments={"seed": 0}, shard_size=8)
    (out / "shard-000000.tar").write_bytes(b"cut off by a crash of the machine")
    build(Rows("unit", samples), out, arguments={"seed": 0}, shard_size=8)
    assert contents(out) == contents(built)


@pytest.mark.parametrize("num_workers", [2, 5])
def test_bytes_do_not_depend_on_the_number_of_processes(
    built: Path, raw: Raw, tmp_path: Path, num_workers: int
) -> None:
    samples = Rows("unit", [raw(number, number % 3) for number in range(23)])
    out = tmp_path / "out"
    build(samples, out, arguments={"seed": 0}, shard_size=8, num_workers=num_workers)
    assert contents(out) == contents(built)


class Killer(Rows):
    """Row 10 kills the process that reads it, as the kernel does when memory is short."""

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        if start <= 10 < stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rows(start, stop)


def test_killed_worker_is_an_error_and_the_build_goes_on(
    built: Path, raw: Raw, tmp_path: Path
) -> None:
    samples = [raw(number, number % 3) for number in range(23)]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="a worker was killed"):
        build(Killer("unit", samples), out, arguments={"seed": 0}, shard_size=8, num_workers=2)
    build(Rows("unit", samples), out, arguments={"seed": 0}, shard_size=8)
    assert contents(out) == contents(built)


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_killed_command_goes_on(tmp_path: Path, num_workers: str) -> None:
    def command(out: str) -> list[str]:
        options = ["--format", "digits", "--num-samples", "1500", "--shard-size", "50"]
        place = ["--out", str(tmp_path / out), "--workers", num_workers]
        return [sys.executable, "-m", "data_tools.build", "digits", *options, *place]

    process = subprocess.Popen(command("out"), stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "out").glob("shard-*.tar"))) < 3:
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(".parts/0*.json")}
    done = subprocess.run(command("out"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run(command("whole"), check=True, stderr=subprocess.DEVNULL)
    assert kept and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_builds_in_one_folder(raw: Raw, tmp_path: Path) -> None:
    class Nested(Rows):
        def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
            with pytest.raises(UserError, match="another build is writing here"):
                build(Rows("s", self.samples), tmp_path / "out", arguments={})
            return super().rows(start, stop)

    build(Nested("s", [raw(0, 0)]), tmp_path / "out", arguments={})
    assert len(ShardIndex.load(tmp_path / "out")) == 1


def test_shard_of_rejects_leaves_no_file(raw: Raw, tmp_path: Path) -> None:
    bad = [SampleError("from_the_source", "why")] * 4
    samples = Rows("s", [raw(0, 1), raw(1, 1), *bad, raw(6, 1)])
    report = build(samples, tmp_path / "out", arguments={}, shard_size=2, max_reject_rate=1)
    assert report.rejected == {"from_the_source": 4}
    index = ShardIndex.load(tmp_path / "out")
    assert [shard.name for shard in index.shards] == ["shard-000000.tar", "shard-000003.tar"]
    assert [ShardReader(index).read(i).key[-1] for i in range(3)] == ["0", "1", "6"]


def test_foreign_files_are_never_deleted(
    command: Callable[..., int], tmp_path: Path, built: Path, raw: Raw
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    (tmp_path / "out" / "shard-000000.tar").write_text("x")
    assert command() == 2
    assert (tmp_path / "out" / "shard-000000.tar").read_text() == "x"
    with pytest.raises(UserError, match="not from an unfinished build"):
        build(Rows("s", [raw(0, 0)]), built, arguments={})
    (tmp_path / "file").write_text("x")
    assert command(out="file") == 2


def test_url_as_out(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(out="s3://bucket/x") == 2
    assert command(out="pipe:true") == 2
    assert "local folder only" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["build", "verify", "inspect"])
def test_help_has_an_example_and_is_light(tool: str) -> None:
    code = (
        f"import sys, data_tools.{tool} as tool\n"
        "try: tool.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'webdataset'} & set(sys.modules), 'slow import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout and f":\n  python -m data_tools.{tool} " in done.stdout


def test_digits_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--format", "digits", "--num-samples", "24", "--shard-size", "10"]
    assert main(["digits", *options, "--out", str(tmp_path / "a")]) == 0
    assert main(["digits", *options, "--out", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(ShardIndex.load(tmp_path / "a")) == 24
    assert main(["elsewhere", *options, "--out", str(tmp_path / "c")]) == 2
    assert "write `digits`" in capsys.readouterr().err
    assert main(["digits", *options, "--kinds", "read,nope", "--out", str(tmp_path / "c")]) == 2
    assert "--kinds nope: digits has " in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    options += ["--kinds", "read", "--split", "heldout"]
    assert main(["digits", *options, "--out", str(tmp_path / "d")]) == 0
    assert ShardIndex.load(tmp_path / "d").kinds == ("read",)


def test_inspect(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect([str(built), "--sample", "2"]) == 0
    out = capsys.readouterr().out
    for expected in ("shard-000002.tar", "23", "many", "unit/000000002", "[image 13x9]"):
        assert expected in out
    assert inspect([str(built), "--sample", "23"]) == 2
    assert inspect([str(built / "nowhere")]) == 2


def test_terminal_control_is_escaped(
    raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;owned\x07[bold]\u202ex\n"
    assert printable(hostile) == r"\x1b]0;owned\x07[bold]\u202ex\n"
    sample = dataclasses.replace(raw(0, 0), kind=hostile, answers=[hostile])
    sample.messages[1]["content"][0]["text"] = hostile
    build(Rows("s", [sample]), tmp_path / "out", arguments={})
    assert inspect([str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert r"\x1b]0;owned" in out and "[bold]" in out
    assert "\x1b]0" not in out and "\u202e" not in out and "\x07" not in out
