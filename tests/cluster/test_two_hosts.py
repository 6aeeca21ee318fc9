"""A run over two hosts through a hostfile: the same numbers, and an end when a rank is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.two_hosts import ADDRESSES, DEVICE, TwoHosts
from tests.fixtures import ROOT, environment, recipe_tree, records, run_ranks, write_recipe

pytestmark = pytest.mark.cluster

LAUNCH = [sys.executable, "-m", "launch"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[TwoHosts]:
    with TwoHosts(tmp_path_factory.mktemp("hosts")) as lab:
        yield lab


@pytest.fixture
def recipe(tmp_path, pair, shards) -> Path:
    stages = [{"kind": "distill", "steps": 6}]
    tree = recipe_tree(tmp_path, pair, shards, stages=stages, checkpoint={"every": 2})
    return write_recipe(tmp_path / "r.yaml", **tree)


def losses(folder: Path) -> list[float]:
    return [record["metrics"]["loss"] for record in records(folder / "distill")]


def finish(process: subprocess.Popen, seconds: int = 150) -> str:
    """Its output; killed (and with it its node agents' connections) when it does not end."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running:\n{process.communicate()[0][-3000:]}") from None


@pytest.mark.parametrize(("form", "slots"), [("launch", 1), ("card", 2)])
def test_losses_equal_those_of_one_host(lab, tmp_path, recipe, form, slots):
    """1+1 ranks by python -m launch, 2+2 by the card's form; beside a hostile .deepspeed_env."""
    marker = tmp_path / "marker"
    (tmp_path / ".deepspeed_env").write_text(f"PYTHONX=$(touch {marker})\n")
    hosts = ["--hostfile", str(lab.hostfile(slots))]
    command = [*LAUNCH, str(recipe), *hosts]
    if form == "card":
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        command = [deepspeed, str(ROOT / "launch/train.py"), str(recipe), *hosts]
    hostile = environment(PYTHON_NOTE=f"$(touch {marker}) `touch {marker}`")
    process = lab.start([*command, f"run_dir={tmp_path}/two"], hostile, tmp_path)
    output = finish(process)
    assert process.returncode == 0, output[-4000:]
    assert not marker.exists()

    run_ranks(ROOT / "launch/train.py", [recipe, f"run_dir={tmp_path}/one"], 2 * slots)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    attempt = tmp_path / "two/logs/attempt-001"
    assert {path.name for path in attempt.iterdir()} == {
        "attempt.json", "recipe.yaml", "10.77.0.1.log", "10.77.0.2.log",
    }  # fmt: skip
    assert (tmp_path / "two/DONE").is_file()


def test_a_killed_rank_ends_all_and_the_restart_is_exact(lab, tmp_path, recipe):
    run_ranks(ROOT / "launch/train.py", [recipe, f"run_dir={tmp_path}/whole"])
    command = [*LAUNCH, str(recipe), "--hostfile", str(lab.hostfile(1)), f"run_dir={tmp_path}/cut"]
    process = lab.start([*command, "data.num_workers=1"], environment(), tmp_path)
    ledger = tmp_path / "cut/distill/ledger.jsonl"
    deadline = time.monotonic() + 120
    while not (ledger.is_file() and ledger.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    rank = lab.processes(1, "launch/train.py")
    ranks = [pid for pid in rank if "RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(min(ranks), signal.SIGKILL)  # the rank, started before its data worker
    killed = time.monotonic()
    output = finish(process, 60)
    assert time.monotonic() - killed < 60
    assert process.returncode not in (0, None)
    assert output.strip().splitlines()[-1].startswith("failed with code"), output[-2000:]
    for host in (0, 1):
        assert lab.processes(host, "launch/train.py") == []

    process = lab.start([*command, "data.num_workers=1"], environment(), tmp_path)
    output = finish(process)
    assert process.returncode == 0 and "resumed at step" in output, output[-4000:]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in ("student/model.safetensors", "recalibrator/recalibrator.safetensors"):
        exported = [(tmp_path / run / "distill" / name).read_bytes() for run in ("cut", "whole")]
        assert exported[0] == exported[1], name


def test_a_signal_to_the_launcher_stops_all_hosts_with_a_checkpoint(lab, tmp_path, recipe):
    command = [*LAUNCH, str(recipe), "--hostfile", str(lab.hostfile(1))]
    command += ["stages.distill.steps=500", "checkpoint.every=0"]
    process = lab.start(command, environment(), tmp_path)
    ledger = tmp_path / "run/distill/ledger.jsonl"
    deadline = time.monotonic() + 120
    while not ledger.is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 60)
    assert process.returncode == 75, output[-3000:]
    assert output.strip().splitlines()[-1].startswith("stopped: ")
    assert (tmp_path / "run/STOPPED").is_file()
    assert list((tmp_path / "run/distill/checkpoints").glob("step-*/manifest.json"))


def test_deepspeeds_own_hostfile_form(lab, tmp_path, recipe):
    """DeepSpeed reads the hostfile itself, goes over pdsh and needs its .deepspeed_env."""
    lines = [f"GLOO_SOCKET_IFNAME={DEVICE}", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    lines.append(f"PATH={environment()['PATH']}")
    (tmp_path / ".deepspeed_env").write_text("".join(line + "\n" for line in lines))
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile"]
    deepspeed += [str(lab.hostfile(1)), "--master_addr", ADDRESSES[0]]
    command = [*deepspeed, str(ROOT / "launch/train.py"), str(recipe)]
    process = lab.start([*command, "stages.distill.steps=2"], environment(), tmp_path)
    output = finish(process)
    assert process.returncode == 0, output[-4000:]
    assert (tmp_path / "run/DONE").is_file()
    assert records(tmp_path / "run/distill")[0]["world_size"] == 2
