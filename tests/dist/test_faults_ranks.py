"""What happens when a step, a rank or the cluster goes wrong: two real ranks each time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures import ROOT, environment, recipe_tree, records, run_ranks, write_recipe

pytestmark = pytest.mark.dist

SCRIPT = ROOT / "tests/dist/ranks_faults.py"


def run(scenario: str, recipe: Path, out: Path) -> list[dict]:
    run_ranks(SCRIPT, [scenario, recipe, out])
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def recipe(tmp_path, pair, shards) -> Path:
    tree = recipe_tree(
        tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 6}], checkpoint={"every": 3},
        faults={"max_skipped": 3},
    )  # fmt: skip
    return write_recipe(tmp_path / "r.yaml", **tree)


def test_a_nan_of_one_rank_skips_the_step_on_all(tmp_path, recipe):
    ranks = run("nan", recipe, tmp_path)
    for rank in ranks:
        digests = rank["digests"]
        assert rank["error"] is None and rank["skipped"] == 2
        changed = [after != before for before, after in zip(digests, digests[1:], strict=False)]
        # steps 2..6; the third and the fifth left weights, moments and their counter as they were
        assert changed == [True, False, True, False, True]
    run_folder = tmp_path / "run/sft"
    for rank in range(2):
        faults = records(run_folder / "faults", f"rank{rank}.jsonl")
        assert [(line["kind"], line["step"]) for line in faults] == [("skipped", 3), ("skipped", 5)]
        assert all(len(line["keys"]) == len(line["samples"]) == 4 for line in faults)
        assert all(key.startswith("digits") for line in faults for key in line["keys"])
        has_nan = {"nan" in line["losses"] for line in faults}
        assert has_nan == {rank == 1}
    log = records(run_folder)
    assert [line["skipped"] for line in log] == [0, 0, 1, 1, 2, 2]
    assert "loss" not in log[2]["metrics"] and "loss" in log[3]["metrics"]


def test_too_many_skipped_steps_end_the_run_on_all_ranks(tmp_path, recipe):
    for rank in run("nan_forever", recipe, tmp_path):
        assert rank["skipped"] == 3
        assert rank["error"].startswith("3 steps in a row had no finite gradient")


def test_ranks_that_would_call_different_modules_say_so(tmp_path, recipe):
    """Instead of waiting in each other's all-gathers for ever."""
    for rank in run("mismatch", recipe, tmp_path):
        assert rank["error"].startswith(
            "step 0: ranks would call different modules: rank 0: 1 micro"
        )
        assert "rank 1: 1 micro-batches: text" in rank["error"]


def test_mixed_modalities_over_ranks_never_hang(tmp_path, pair, shards):
    """200 steps; each rank has text, pictures or nothing at all, as it happens."""
    stages = [{"kind": "distill", "steps": 200}]
    tree = recipe_tree(tmp_path, pair, shards, stages=stages)
    ranks = run("mixed", write_recipe(tmp_path / "r.yaml", **tree), tmp_path)
    assert ranks[0]["loss"] == ranks[1]["loss"]
    assert all(len(rank["classes"]) >= 2 for rank in ranks)


def start_ranks(recipe: Path, *overrides: str) -> list[subprocess.Popen]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(21000 + os.getpid() % 20000)
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "launch/train.py", recipe, *overrides],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip


def wait_for_steps(folder: Path, count: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    ledger = folder / "ledger.jsonl"
    while not (ledger.is_file() and ledger.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_becomes_an_error_that_names_it(tmp_path, recipe, stopped):
    """Rank 0 hosts the store that the ranks tell their places to: its silence is a message too."""
    processes = start_ranks(recipe, "stages.sft.steps=5000", "faults.stall_seconds=6")
    try:
        wait_for_steps(tmp_path / "run/sft", 3, processes)
        processes[stopped].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        output = processes[1 - stopped].communicate(timeout=60)[0]
        assert time.monotonic() - began < 45
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - stopped].returncode == 70, output[-2000:]
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"rank {1 - stopped}: no progress for "), output[-2000:]
    expected = (
        "rank 0 is stopped or gone"
        if stopped == 0
        else "rank 1 is stopped or gone, last seen in step "
    )
    assert expected in last
    stacks = (tmp_path / f"run/sft/faults/stall-rank{1 - stopped}.txt").read_text()
    assert "trainer.py" in stacks and "Thread" in stacks


@pytest.mark.parametrize("asked", ["SIGUSR1", "SIGTERM", "all", "file"])
def test_a_request_to_any_rank_stops_all_with_one_checkpoint(tmp_path, recipe, asked):
    """Twice, too; with data workers, which outlive the signals that reach them."""
    processes = start_ranks(
        recipe, "stages.sft.steps=5000", "checkpoint.every=0", "data.num_workers=1"
    )
    try:
        wait_for_steps(tmp_path / "run/sft", 3, processes)
        if asked == "file":
            (tmp_path / "run/STOP").touch()
        elif asked == "all":
            for process in processes:
                for pid in [process.pid, *children(process.pid)]:
                    os.kill(pid, signal.SIGTERM)
        else:
            for _ in range(2):
                processes[1].send_signal(getattr(signal, asked))
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    stopped = json.loads((tmp_path / "run/STOPPED").read_text())
    found = [
        path.parent.name for path in (tmp_path / "run").glob("sft/checkpoints/*/manifest.json")
    ]
    assert found == [f"step-{stopped['step']:08d}"]
    ledger = records(tmp_path / "run/sft", "ledger.jsonl")
    assert [line["step"] for line in ledger] == list(range(1, stopped["step"] + 1))
    assert not (tmp_path / "run/DONE").exists()


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
