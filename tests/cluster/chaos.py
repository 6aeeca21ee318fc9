"""Kill a random rank at a random time, start again, and compare with a run nobody disturbed.

python -m tests.cluster.chaos --runs 20 [--seed 0] [--folder DIR]

A kill may fall into a start, a step, a save, an export; every third one waits for a save to be
under way. After every run the ledger must name each
global batch once, in order, and the exported weights must be those of the undisturbed run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fixtures import ROOT, environment, recipe_tree, records, untie, write_recipe

STEPS, EVERY = 60, 2  # half of the time is spent in saves
LONGEST = 18.0  # seconds from a start until the kill at the latest; a start takes 7


def launch(recipe: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch", str(recipe), f"run_dir={run}"]
    return subprocess.Popen(
        [*command, "--hostfile", str(recipe.parent / "hosts")],
        env=environment(DS_ACCELERATOR="cpu"), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ranks_below(pid: int) -> list[int]:
    """Pids of launch/train.py among a process's descendants, data workers included."""
    found, waiting = [], [pid]
    while waiting:
        try:
            path = Path(f"/proc/{waiting.pop()}/task")
            below = [int(c) for task in path.iterdir() for c in
                     (task / "children").read_text().split()]  # fmt: skip
        except OSError:
            continue
        for child in below:
            waiting.append(child)
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"launch/train.py" in command and b"deepspeed.launcher" not in command:
                if b"launch.node" not in command:
                    found.append(child)
    return sorted(found)


def disturbed_run(recipe: Path, run: Path, chance: random.Random) -> list[str]:
    """Start, kill, start again until it is done; what was hit. Every other start is left alone."""
    hits = []
    for attempt in range(12):
        process = launch(recipe, run)
        if attempt % 2 == 0:
            end = time.monotonic() + chance.uniform(3.0, LONGEST)
            in_save = chance.random() < 1 / 3
            while process.poll() is None and (time.monotonic() < end or in_save):
                if in_save and place_of(run) == "save" and time.monotonic() > end - LONGEST / 2:
                    break
                time.sleep(0.002)
            victims = ranks_below(process.pid)
            if victims and process.poll() is None:
                os.kill(chance.choice(victims), signal.SIGKILL)
                hits.append(place_of(run))
        output = process.communicate(timeout=120)[0]
        if process.returncode == 0:
            assert (run / "DONE").is_file(), output[-3000:]
            return hits
        if attempt % 2:
            raise AssertionError(f"an undisturbed restart failed:\n{output[-4000:]}")
    raise AssertionError("never done")


def place_of(run: Path) -> str:
    """Where the run was: for the report."""
    stage = run / "sft"
    if list((stage / "checkpoints").glob("*.tmp")):
        return "save"
    if (stage / "student.tmp").exists():
        return "export"
    ledger = stage / "ledger.jsonl"
    return f"step {len(ledger.read_text().splitlines())}" if ledger.is_file() else "start"


def check(run: Path, expected: Path) -> None:
    """Nothing lost, nothing twice, the same result."""
    ledger = records(run / "sft", "ledger.jsonl")
    assert [line["step"] for line in ledger] == list(range(1, STEPS + 1))
    assert ledger == records(expected / "sft", "ledger.jsonl")
    name = "sft/student/model.safetensors"
    assert (run / name).read_bytes() == (expected / name).read_bytes()


def chaos(pair: Path, shards: Path, folder: Path, runs: int, seed: int) -> list[list[str]]:
    """What each run was hit by. Raises AssertionError for one that did not come through."""
    stages = [{"kind": "sft", "steps": STEPS}]
    tree = recipe_tree(folder, pair, shards, stages=stages, checkpoint={"every": EVERY})
    recipe = write_recipe(folder / "r.yaml", **tree)
    (folder / "hosts").write_text("localhost slots=2\n")
    whole = launch(recipe, folder / "whole")
    output = whole.communicate(timeout=240)[0]
    assert whole.returncode == 0, output[-3000:]
    found = []
    for number in range(runs):
        run = folder / f"run-{number:02d}"
        hits = disturbed_run(recipe, run, random.Random(f"{seed} {number}"))
        check(run, folder / "whole")
        found.append(hits)
        print(f"run {number}: hit in {', '.join(hits) or 'nothing'}; same result", flush=True)
    return found


def main() -> int:
    from launch.demo.pair import build_pair
    from tests.fixtures import build_digit_shards, texts_of_digits

    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result here, as json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_pair(texts_of_digits(), folder / "pair")
        untie(folder / "pair/student_init", folder / "pair/student_untied")
        build_digit_shards(folder / "train", "train", 200, seed=2)
        build_digit_shards(folder / "validation", "validation", 24)
        hits = chaos(folder / "pair", folder, folder, arguments.runs, arguments.seed)
    if arguments.out:
        arguments.out.write_text(json.dumps({"seed": arguments.seed, "hits": hits}, indent=1))
    print(f"{len(hits)} of {arguments.runs} runs came through")
    return 0


if __name__ == "__main__":
    sys.exit(main())
