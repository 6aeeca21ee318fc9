"""Evaluation on one rank and on three, undisturbed and killed: the same files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.fixtures import ROOT, environment, run_ranks

pytestmark = pytest.mark.dist


def arguments(pair, shards, out, *more: str) -> list[str]:
    model = str(pair / "student_init")
    sizes = ["--batch-size", "4", "--max-new-tokens", "8", "--limit", "22"]
    return [model, str(shards / "validation"), "--out", str(out), *sizes, *more]


def files(out) -> tuple[bytes, bytes]:
    assert not out.with_suffix(".parts").exists()
    return out.read_bytes(), out.with_suffix(".predictions.jsonl").read_bytes()


def test_one_rank_three_ranks_and_a_kill(tmp_path, pair, shards):
    script = ROOT / "genrecal_ds/evaluate/__main__.py"
    run_ranks(script, arguments(pair, shards, tmp_path / "one.json"), 1)
    expected = files(tmp_path / "one.json")
    assert json.loads(expected[0])["scores"]["overall"]["n"] == 22
    run_ranks(script, arguments(pair, shards, tmp_path / "three.json"), 3)
    assert files(tmp_path / "three.json") == expected

    out = tmp_path / "cut.json"
    command = [sys.executable, "-m", "genrecal_ds.evaluate", *arguments(pair, shards, out)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    part = out.with_suffix(".parts") / "0000-000.jsonl"
    deadline = time.monotonic() + 120
    while not (part.is_file() and part.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with part.open("a") as file:
        file.write('{"batch": 5, "answ')  # as a kill within a write leaves it
    other = subprocess.run(
        [*command, "--max-new-tokens", "9"], cwd=ROOT, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert other.returncode == 2 and "another decoding lie here" in other.stderr
    run_ranks(script, arguments(pair, shards, out), 2)
    assert files(out) == expected
