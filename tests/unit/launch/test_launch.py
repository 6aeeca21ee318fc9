"""Launching without machines: commands that would run, attempts, and one host's agent."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.hostfile import refuse_shared_devices
from genrecal_ds.recipe.recipe_file import load_recipe
from launch import attempt, checks
from launch.hosts import _node_command
from launch.ranks import ranks_of_slurm
from tests.fixtures import ROOT, environment

pytestmark = pytest.mark.unit

SLURM = ROOT / "launch/slurm"


@pytest.fixture
def recipe(tmp_path):
    tree = {
        "run_dir": str(tmp_path / "run"), "student": {"path": "student"},
        "data": {"train": "s3://bob:hunter2secret@store/train"},
        "batch": {"global_batch": 8, "micro_batch": 1},
        "stages": [{"kind": "sft", "name": "a-1", "steps": 5}, {"kind": "sft", "steps": 5}],
        "log": {"wandb": "$(touch marker) `touch marker`"},
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_values_reach_a_remote_shell_quoted():
    hostile = ["r.yaml", "run_dir=$(touch x); `touch x` && 'a' \"b\""]
    command = _node_command({"a": 2, "b": 2}, 1, "a:29500", hostile, is_local=False)
    assert command[0] == "ssh" and command[-2] == "b"
    words = shlex.split(command[-1])
    assert words[:3] == ["cd", str(ROOT), "&&"]
    assert words[-2:] == hostile and words[words.index("--node-rank") + 1] == "1"
    assert _node_command({"localhost": 2}, 0, "127.0.0.1:1", [], is_local=True)[0] == sys.executable


def test_attempts_are_numbered_redacted_and_know_when_they_get_nowhere(recipe, tmp_path):
    loaded = load_recipe(recipe)
    folder = attempt.begin(loaded, arguments=["WANDB_API_KEY=abcdef123456"])
    text = "".join(path.read_text() for path in folder.iterdir())
    assert "hunter2secret" not in text and "abcdef123456" not in text
    assert "$(touch marker)" in text and not (tmp_path / "marker").exists()
    assert json.loads((folder / "attempt.json").read_text())["progress"] == {"a-1": 0, "sft": 0}
    assert [attempt.begin(loaded).name for _ in range(2)] == ["attempt-002", "attempt-003"]
    assert attempt.is_stuck(loaded)
    stage = tmp_path / "run/a-1"
    stage.mkdir()
    (stage / "ledger.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert attempt.progress(loaded) == {"a-1": 2, "sft": 0} and not attempt.is_stuck(loaded)
    assert attempt.outcome(loaded) == "failed"
    (tmp_path / "run/STOPPED").touch()
    assert attempt.outcome(loaded) == "stopped"
    (stage / "DONE").touch()
    assert attempt.outcome(loaded, "a-1") == "done"


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_train_sbatch_shows_its_commands(recipe, launcher):
    env = environment(LAUNCHER=launcher, RANKS_PER_NODE="8", GENRECAL_PYTHON="py", SLURM_NNODES="2")
    arguments = [str(recipe), "run_dir=a b", "--dry-run"]
    shown = subprocess.run(
        ["bash", SLURM / "train.sbatch", *arguments], cwd=ROOT, env=env, capture_output=True,
        text=True,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    begin, step, end = (shlex.split(line) for line in shown.stdout.splitlines())
    assert begin[:4] == ["py", "-m", "launch.attempt", "begin"] and begin[-1] == "run_dir=a b"
    assert step[0] == "srun" and step[-2:] == [str(recipe), "run_dir=a b"]
    tasks = "--ntasks=16" if launcher == "srun" else "--ntasks=2"
    assert tasks in step and end[3] == "end"


def test_the_other_scripts_show_theirs(recipe):
    def show(name: str, *arguments: str) -> list[list[str]]:
        done = subprocess.run(
            ["bash", SLURM / name, *arguments, "--dry-run"], cwd=ROOT, capture_output=True,
            text=True, env=environment(
                GENRECAL_PYTHON=sys.executable, GENRECAL_SBATCH="--nodes 4",
                GENRECAL_SBATCH_a_1="--nodes 2",
            ),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines()]

    first, second = show("pipeline.sbatch", str(recipe))
    assert first[-2:] == ["--stage", "a-1"] and first.count("--nodes") == 2
    assert "--dependency=afterok:JOB_OF_a-1" in second and second.count("--nodes") == 1
    assert show("eval.sbatch", "a", "b")[0][-2:] == ["a", "b"]
    assert show("build_shards.sbatch", "x", "--out", "y")[0][-2:] == ["--task", "0/1"]


def test_scripts_are_sound_shell():
    for path in [*SLURM.glob("*.sbatch"), SLURM / "common.sh"]:
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path.name


def test_ranks_of_slurm(monkeypatch):
    task = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    monkeypatch.setattr(os, "environ", dict(task))  # whole: nothing of it outlives the test
    with pytest.raises(UserError, match="MASTER_ADDR"):
        ranks_of_slurm()
    os.environ["MASTER_ADDR"] = "n1"
    ranks_of_slurm()
    assert [os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    monkeypatch.setattr(os, "environ", {**task, "RANK": "0"})  # a launcher's word goes first
    ranks_of_slurm()
    assert os.environ["RANK"] == "0" and "WORLD_SIZE" not in os.environ


def test_a_stage_that_is_not_there_and_ranks_that_do_not_divide_are_refused(recipe, monkeypatch):
    monkeypatch.setattr(checks, "check_folders", lambda recipe: None)

    def read(stage, num_ranks):
        given = Namespace(recipe=str(recipe), overrides=[], stage=stage)
        return checks.read_recipe(given, num_ranks)

    assert read("sft", 4).stages[1].name == "sft"
    with pytest.raises(UserError, match="--stage sfd: the recipe's stages are .*a-1.*sft"):
        read("sfd", 4)
    with pytest.raises(UserError, match="global_batch"):
        read(None, 3)


def test_two_ranks_on_one_gpu_are_refused():
    refuse_shared_devices([("a", "gpu-1"), ("a", "gpu-2"), ("b", "gpu-1")])
    with pytest.raises(UserError, match="ranks 0 and 2 both drive GPU gpu-1 of a"):
        refuse_shared_devices([("a", "gpu-1"), ("a", "gpu-2"), ("a", "gpu-1")])


LAUNCHER = """
import subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", RANK, sys.argv[1], str(i)]) for i in range(2)]
while any(rank.poll() is None for rank in ranks):
    time.sleep(0.05)
"""
RANK = """
import pathlib, signal, sys, time
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGUSR1, lambda *_: (folder / f"told-{number}").touch())
(folder / f"ready-{number}").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["stop", "kill", "lost", "rank"])
def test_an_agent_tells_its_ranks_and_ends_only_them(tmp_path, how, monkeypatch):
    """A stand-in for DeepSpeed's launcher with two ranks that never end by themselves."""
    program = (
        "import subprocess, sys, launch.node as node, queue, threading\n"
        "node.GRACE_SECONDS = 2.0\n"
        "messages = queue.SimpleQueue()\n"
        "threading.Thread(target=node._read_control, args=(messages,), daemon=True).start()\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]])\n"
        "sys.exit(node.Ranks(child, messages).wait())\n"
    )
    launcher = f"RANK = {RANK!r}\n{LAUNCHER}"
    agent = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path, launcher], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        wait_for(lambda: all((tmp_path / f"ready-{i}").exists() for i in range(2)))
        time.sleep(0.6)  # the agent has seen both
        if how == "rank":
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            inner = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
            os.kill(int(inner[0]), signal.SIGKILL)
        elif how == "lost":
            agent.stdin.close()
        else:
            agent.stdin.write(how + "\n")
            agent.stdin.flush()
        if how in ("stop", "lost"):
            wait_for(lambda: all((tmp_path / f"told-{i}").exists() for i in range(2)))
        if how == "stop":
            assert agent.poll() is None  # the ranks end when they are ready to
            agent.stdin.write("kill\n")
            agent.stdin.flush()
        assert agent.wait(15) == 128 + signal.SIGKILL
        assert bystander.poll() is None
    finally:
        for process in (agent, bystander):
            process.kill()


def wait_for(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
