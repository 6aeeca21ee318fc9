"""Checkpoints that were spoiled, by whom ever; and resuming on other numbers of ranks."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import (
    ROOT,
    partitioning_ds_configs,
    recipe_tree,
    records,
    run_ranks,
    write_recipe,
)

SCRIPT = ROOT / "tests/dist/ranks_checkpoints.py"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(SCRIPT, ["damage", folder / "saved", folder / "out.json"])
    return json.loads((folder / "out.json").read_text())


@pytest.mark.dist
def test_every_file_spoiled_in_turn_gives_the_one_before(damaged):
    """auto: the newest that is whole. latest: what was asked for, or an error that says why."""
    files = json.loads(damaged["files"])
    assert len(files) == 5 and "manifest.json" in files  # two ranks, model and optimizer
    for name in files:
        for kind in ("truncated", "flipped", "removed"):
            assert damaged[f"{kind} {name}: auto"] == "step-00000002", (kind, name)
            said = damaged[f"{kind} {name}: latest"]
            assert said.startswith("error: ") and "step-00000003" in said, said
            assert name in said or "no whole checkpoint" in said, said
    assert damaged["whole"] == "step-00000003" and damaged["tag"] == "step-00000002"
    assert damaged["loaded"] == "4"


@pytest.mark.dist
def test_never_a_silent_start_from_step_0(damaged):
    assert damaged["nothing yet"] == "None"
    assert "none is whole" in damaged["all gone"]
    assert damaged["begun anew"] == "None"
    for pointer in ("pointer empty", "pointer naming nothing", "pointer hostile"):
        assert damaged[f"{pointer}: auto"] == "step-00000003"
        assert damaged[f"{pointer}: latest"].startswith("error: "), pointer
    assert damaged["pointer removed: auto"] == "step-00000003"
    assert damaged["pointer removed: latest"].startswith("error: ")


@pytest.mark.dist
def test_incomplete_ones_are_invisible_and_old_ones_go(damaged):
    assert json.loads(damaged["kept"]) == ["step-00000002", "step-00000003"]
    assert damaged["half written"] == "step-00000003"
    assert json.loads(damaged["after it"]) == ["step-00000003", "step-00000004"]
    assert json.loads(damaged["set aside"]) == ["abandoned-step-00000004", "step-00000003"]


@pytest.mark.dist
def test_what_anyone_may_write_is_not_loaded(damaged):
    assert "--trust-checkpoint" in damaged["writable by anyone"]
    assert damaged["writable by anyone, trusted"] == "step-00000003"


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MiB; the owner of the machine may mount one."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "genrecal", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@pytest.mark.cluster
def test_a_full_disk_stops_all_ranks_and_spares_the_last_checkpoint(small_disk, tmp_path):
    run_ranks(SCRIPT, ["full", small_disk, tmp_path / "out.json"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["first"] == "None"
    assert "No space left on device" in found["second"], found
    assert "the last checkpoint is step-00000001" in found["second"]
    assert json.loads(found["left"]) == ["step-00000001"] and found["auto"] == "step-00000001"
    assert found["third"] == "None" and found["then"] == "step-00000002"


@pytest.mark.cluster
def test_a_read_only_folder_is_an_error_on_all_ranks(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run_ranks(SCRIPT, ["read_only", small_disk, tmp_path / "out.json"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["save"].startswith("error: ") and "Read-only file system" in found["save"]


@pytest.mark.dist
def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path, pair, shards):
    """4, then 2, then 8 ranks from one recipe: the same global batches, the same losses."""
    tree = recipe_tree(
        tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 6}],
        batch={"global_batch": 8, "micro_batch": 1}, checkpoint={"every": 2, "keep": 9},
    )  # fmt: skip
    # Of a decayed matrix and an undecayed bias alike, some must be large enough to be sharded.
    tree["deepspeed"] = partitioning_ds_configs(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    train = ROOT / "launch/train.py"

    def go_on(name: str, source: str, step: int, world_size: int) -> str:
        folder = tmp_path / name / "sft"
        saved = tmp_path / source / f"sft/checkpoints/step-{step:08d}"
        shutil.copytree(saved, folder / "checkpoints" / saved.name)
        for log in ("metrics.jsonl", "ledger.jsonl"):
            lines = (tmp_path / source / "sft" / log).read_text().splitlines(keepends=True)
            (folder / log).write_text("".join(lines[:step]))
        return run_ranks(train, [recipe, f"run_dir={tmp_path / name}"], world_size)

    run_ranks(train, [recipe, f"run_dir={tmp_path}/four"], 4)
    assert "written by 4 ranks, by 2 now" in go_on("two", "four", 2, 2)
    assert "written by 2 ranks, by 8 now" in go_on("eight", "two", 4, 8)
    whole = records(tmp_path / "four/sft")
    for name, sizes in (("two", [4, 4, 2, 2, 2, 2]), ("eight", [4, 4, 2, 2, 8, 8])):
        log = records(tmp_path / name / "sft")
        assert [line["world_size"] for line in log] == sizes
        for line, expected in zip(log, whole, strict=True):
            assert line["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=2e-5)
            assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=2e-4)
        ledgers = [records(tmp_path / run / "sft", "ledger.jsonl") for run in (name, "four")]
        assert ledgers[0] == ledgers[1]
    assert not list((tmp_path / "eight/sft/checkpoints").glob("*universal*"))

    # Another file of DeepSpeed's cuts the optimizer's numbers into other groups.
    path = Path(tree["deepspeed"]["student"])
    config = json.loads(path.read_text())
    config["zero_optimization"]["sub_group_size"] //= 8
    path.write_text(json.dumps(config))
    assert "resumed at step 2" in go_on("regrouped", "four", 2, 4)
    for line, expected in zip(records(tmp_path / "regrouped/sft"), whole, strict=True):
        assert line["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=1e-6)


@pytest.mark.dist
def test_a_named_checkpoint_is_of_the_first_unfinished_stage(tmp_path, pair, shards):
    """Later stages begin; one that is named and not there is an error, also in a new run."""
    stages = [{"kind": "sft", "name": name, "steps": 4} for name in ("one", "two")]
    tree = recipe_tree(tmp_path, pair, shards, stages=stages, checkpoint={"every": 1, "keep": 9})
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    train, run = ROOT / "launch/train.py", tmp_path / "run"
    with pytest.raises(AssertionError, match="no whole checkpoint step-00000002; there are: none"):
        run_ranks(train, [recipe, "resume=step-00000002"], 1)
    whole = run_ranks(train, [recipe], 1)
    assert "resumed" not in whole and (run / "DONE").is_file()
    weights = (run / "two/student/model.safetensors").read_bytes()
    shutil.rmtree(run / "two")
    (run / "one/DONE").unlink()
    output = run_ranks(train, [recipe, "resume=step-00000002"], 1)
    assert "one: resumed at step 2" in output and "two: no checkpoint, starts at step 0" in output
    names = sorted(path.name for path in (run / "one/checkpoints").glob("*step*"))
    assert names == ["abandoned-step-00000003", *(f"step-0000000{n}" for n in (1, 2, 3))]
    assert (run / "two/student/model.safetensors").read_bytes() == weights
    assert "already finished" in run_ranks(train, [recipe, "resume=latest"], 1)
