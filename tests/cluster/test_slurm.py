"""The job scripts on a real SLURM: preemption, the time limit, dependent stages, array builds."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.fixtures import ROOT, environment, recipe_tree, records, write_recipe

pytestmark = pytest.mark.cluster

STEPS = 400
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # munge's socket needs a short path that everyone may enter
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with Slurm(Path(folder)) as slurm:
            yield slurm


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, pair, shards) -> Path:
    """A stage without a teacher: its steps are short, and what is tested is not the loss."""
    folder = tmp_path_factory.mktemp("slurm")
    stages = [{"kind": "sft", "steps": STEPS}]
    tree = recipe_tree(folder, pair, shards, stages=stages, checkpoint={"every": 50})
    return write_recipe(folder / "r.yaml", **tree)


def job_environment(**extra: str) -> dict[str, str]:
    """Nodes of the test cluster have names that nobody resolves, and one python."""
    return {
        **environment(GENRECAL_ROOT=str(ROOT), GENRECAL_PYTHON=sys.executable),
        "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", **extra,
    }  # fmt: skip


def submit(slurm: Slurm, recipe: Path, run: Path, *options: str, **env: str) -> str:
    script = str(ROOT / "launch/slurm/train.sbatch")
    arguments = [*TWO_NODES, *options, script, str(recipe), f"run_dir={run}"]
    return slurm.sbatch(*arguments, cwd=recipe.parent, **job_environment(**env))


@pytest.fixture(scope="module")
def uninterrupted(slurm, recipe) -> bytes:
    """The weights of a job that nobody disturbed."""
    run = recipe.parent / "whole"
    assert slurm.wait(submit(slurm, recipe, run)) == "COMPLETED", log_of(run)
    return weights(run)


def weights(run: Path) -> bytes:
    return (run / "sft/student/model.safetensors").read_bytes()


def log_of(run: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(run.glob("logs/*/ranks.log")))


def attempts(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("logs/*/attempt.json"))]


def wait_until(is_so: Callable[[], bool], seconds: float, run: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.05)


def wait_for_steps(run: Path, count: int) -> None:
    ledger = run / "sft/ledger.jsonl"
    wait_until(lambda: ledger.is_file() and ledger.read_text().count("\n") > count, 120, run)


def test_a_preempted_job_goes_on_and_ends_the_same(slurm, recipe, uninterrupted, tmp_path):
    job = submit(slurm, recipe, tmp_path / "run")
    wait_for_steps(tmp_path / "run", 20)
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait(job) == "COMPLETED", log_of(tmp_path / "run")
    assert slurm.fact(job, "Restarts") == "1"
    started = attempts(tmp_path / "run")
    assert len(started) == 2 and started[0]["progress"] == {"sft": 0}
    assert 20 < started[1]["progress"]["sft"] < STEPS
    assert "stopped by SIGUSR1" in log_of(tmp_path / "run")
    assert weights(tmp_path / "run") == uninterrupted
    steps = [line["step"] for line in records(tmp_path / "run/sft", "ledger.jsonl")]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.timeout(700)
def test_the_time_limit_stops_in_time_and_the_job_goes_on(slurm, recipe, uninterrupted, tmp_path):
    """By DeepSpeed's launcher on each node; the batch script is told, and leaves a STOP file.

    The ranks stand still until it does: no machine is fast enough to end before its limit.
    """
    run = tmp_path / "run"
    options = ("--time=1", "--signal=B:USR1@25")
    job = submit(slurm, recipe, run, *options, LAUNCHER="deepspeed")
    wait_for_steps(run, 20)
    slurm.run("scancel", "--signal=STOP", job)
    wait_until((run / "STOP").exists, 120, run)
    slurm.run("scancel", "--signal=CONT", job)
    assert slurm.wait(job, 600) == "COMPLETED", log_of(run)
    assert int(slurm.fact(job, "Restarts")) >= 1
    assert 0 < attempts(run)[-1]["progress"]["sft"] < STEPS
    assert "stopped by STOP" in log_of(run)
    assert weights(run) == uninterrupted


def test_stages_as_dependent_jobs_then_evaluation(slurm, recipe, pair, shards, tmp_path):
    kinds = ("align", "distill", "sft")
    stages = [{"kind": kind, "steps": 2} for kind in kinds]
    other = write_recipe(tmp_path / "r.yaml", **recipe_tree(tmp_path, pair, shards, stages=stages))
    done = subprocess.run(
        ["bash", str(ROOT / "launch/slurm/pipeline.sbatch"), str(other)], cwd=tmp_path,
        env={**slurm.environment, **job_environment(GENRECAL_SBATCH=" ".join(TWO_NODES))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[-1] for line in done.stdout.splitlines()]
    assert len(jobs) == 3
    assert slurm.fact(jobs[2], "Dependency").startswith(f"afterok:{jobs[1]}")
    for job in jobs:
        assert slurm.wait(job) == "COMPLETED", log_of(tmp_path / "run")
    for kind in kinds:
        assert json.loads((tmp_path / "run" / kind / "DONE").read_text())["steps"] == 2
    assert (tmp_path / "run/DONE").is_file()

    script = str(ROOT / "launch/slurm/eval.sbatch")
    folders = [str(tmp_path / "run/sft/student"), str(shards / "validation")]
    out = tmp_path / "scores.json"
    job = slurm.sbatch(script, *folders, "--out", str(out), cwd=tmp_path, **job_environment())
    assert slurm.wait(job) == "COMPLETED"
    assert json.loads(out.read_text())


def test_an_array_builds_the_same_shards_as_one_process(slurm, tmp_path):
    arguments = ["digits", "--format", "digits", "--num-samples", "150", "--shard-size", "20"]
    script = str(ROOT / "launch/slurm/build_shards.sbatch")
    array = ("--array=3-6", "--ntasks=1")
    out = tmp_path / "array"
    job = slurm.sbatch(
        *array, script, *arguments, "--out", str(out), cwd=tmp_path, **job_environment()
    )
    for task in range(3, 7):
        assert slurm.wait(f"{job}_{task}") == "COMPLETED"
    alone = tmp_path / "alone"
    subprocess.run(
        [sys.executable, "-m", "data_tools.build", *arguments, "--out", alone],
        env=environment(), cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in alone.iterdir()
    }


def test_a_job_that_gets_nowhere_gives_up(slurm, recipe, tmp_path):
    """Every attempt fails before its first step: the third one does not queue itself again."""
    script = str(ROOT / "launch/slurm/train.sbatch")
    arguments = [script, str(recipe), f"run_dir={tmp_path}/run", "--stage", "nonsense"]
    job = slurm.sbatch(*TWO_NODES, *arguments, cwd=tmp_path, **job_environment())
    assert slurm.wait(job) == "FAILED"
    assert len(attempts(tmp_path / "run")) == 3
