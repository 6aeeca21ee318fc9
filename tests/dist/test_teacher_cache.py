"""Stage 2 from the teacher's rows on disk equals stage 2 with the teacher, and nothing is lost."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from genrecal_ds.data.features import FeatureStore
from tests.dist.test_faults_ranks import start_ranks, wait_for_steps
from tests.fixtures import ROOT, recipe_tree, records, run_ranks, write_recipe

pytestmark = pytest.mark.dist

TRAIN = ROOT / "launch/train.py"
STAGES = [{"kind": "align", "steps": 6}, {"kind": "distill", "steps": 6}]
WEIGHTS = ("student/model.safetensors", "recalibrator/recalibrator.safetensors")


def make_recipe(folder: Path, pair: Path, shards: Path, stages=STAGES, **tree) -> Path:
    return write_recipe(
        folder / "r.yaml", **recipe_tree(folder, pair, shards, stages=stages, **tree)
    )


def store_of(cache: Path, num_samples: int) -> FeatureStore:
    """The training data's folder: the one with so many samples or more."""
    for folder in cache.iterdir():
        identity = json.loads((folder / "identity.json").read_text())
        identity.pop("format")
        store = FeatureStore(folder, identity)
        if len(store.samples) >= num_samples:
            return store
    raise AssertionError("no such cache")


def test_stage_2_from_the_cache_is_bitwise_the_live_one(tmp_path, pair, shards):
    """The same plan in both stages, so the rows were made in the same micro-batches."""
    recipe = make_recipe(tmp_path, pair, shards)
    cache = tmp_path / "cache"
    run_ranks(TRAIN, [recipe, f"run_dir={tmp_path}/live"])
    overrides = [f"run_dir={tmp_path}/cached", f"teacher.cache={cache}", "data.num_workers=1"]
    run_ranks(TRAIN, [recipe, *overrides])
    live, cached = tmp_path / "live/distill", tmp_path / "cached/distill"
    assert json.loads((cached / "start.json").read_text())["teacher"] == "cache"
    assert json.loads((live / "start.json").read_text())["teacher"] == "zero3"
    for a, b in zip(records(live), records(cached), strict=True):
        validation = {name for name in a["metrics"] if name.startswith("validation/")}
        for name in a["metrics"].keys() - validation:
            assert a["metrics"][name] == b["metrics"][name], name
        for name in validation:  # its rows were made in other batches
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], rel=1e-5), name
        assert a["gradient_norm"] == b["gradient_norm"]
    for name in WEIGHTS:
        assert (live / name).read_bytes() == (cached / name).read_bytes(), name

    # Another student, another order, twice the steps: what is missing is computed, the rest kept.
    written = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    other = [recipe, f"student.path={pair / 'student_untied'}", "stages.distill.steps=12"]
    other.append("stages.distill.seed=5")
    output = run_ranks(TRAIN, [*other, f"run_dir={tmp_path}/other", f"teacher.cache={cache}"])
    assert "teacher.cache: 0/" in output
    assert all(p.stat().st_mtime_ns == time for p, time in written.items())
    run_ranks(TRAIN, [*other, f"run_dir={tmp_path}/other_live"])
    for a, b in zip(
        records(tmp_path / "other/distill"), records(tmp_path / "other_live/distill"), strict=True
    ):
        assert a["metrics"]["loss"] == pytest.approx(b["metrics"]["loss"], rel=1e-5)

    spoil(tmp_path, recipe, cache, pair)


def spoil(tmp_path: Path, recipe: Path, cache: Path, pair: Path) -> None:
    """A flipped bit, another template, another teacher: refused, with the reason."""

    def fails(message: str, *overrides: str) -> None:
        shutil.rmtree(tmp_path / "cached/distill", ignore_errors=True)
        with pytest.raises(AssertionError, match=message):
            run_ranks(
                TRAIN, [recipe, f"run_dir={tmp_path}/cached", f"teacher.cache={cache}", *overrides]
            )

    changed = tmp_path / "changed"
    for name, spoil_file in (
        ("weights", lambda: flip(changed / "model.safetensors")),
        ("tokens", lambda: append(changed / "chat_template.jinja", " ")),
    ):
        shutil.copytree(pair / "teacher_init", changed)
        spoil_file()
        # the stage's own hash knows the teacher's path, not what is in it
        store = store_of(cache, 48)
        before = json.loads((store.folder / "identity.json").read_text())[name]
        fails(
            f"its rows belong to {name} '{before}'", f"teacher.path={changed}", "--stage", "distill"
        )
        shutil.rmtree(changed)
    flip(store_of(cache, 48).folder / "rank0000-000000.safetensors")  # the one stage 1 wrote
    fails("is damaged; remove the file and cache again")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_killed_while_writing_loses_nothing_and_repeats_nothing(tmp_path, pair, shards):
    stages = [{"kind": "align", "steps": 20}]
    recipe = make_recipe(tmp_path, pair, shards, stages, checkpoint={"every": 2})
    run_ranks(TRAIN, [recipe, f"run_dir={tmp_path}/whole", f"teacher.cache={tmp_path}/expected"])
    overrides = [f"run_dir={tmp_path}/cut", f"teacher.cache={tmp_path}/cache"]
    processes = start_ranks(recipe, *overrides)
    try:
        wait_for_steps(tmp_path / "cut/align", 7, processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[0].wait(60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert "resumed at step" in run_ranks(TRAIN, [recipe, *overrides])
    expected, found = (store_of(tmp_path / name, 160) for name in ("expected", "cache"))
    assert sorted(found.samples) == sorted(expected.samples)
    assert len(np.unique(found.samples)) == len(found.samples) == 160
    for sample in expected.samples.tolist():
        a, b = expected.read(sample), found.read(sample)
        assert torch.equal(a.rows_RH, b.rows_RH) and torch.equal(a.tokens_R, b.tokens_R)
        assert a.turn_lengths == b.turn_lengths
        assert len(a.rows_RH) == sum(a.turn_lengths) + len(a.turn_lengths)


def test_rows_in_8_bits_change_losses_little_and_are_not_taken_for_exact_ones(
    tmp_path, pair, shards
):
    """bf16: rows as computed give the live losses; in 8 bits, by a stated bound."""
    recipe = make_recipe(tmp_path, pair, shards, [{"kind": "distill", "steps": 4}])
    shared = [recipe, "precision=bf16"]
    cached = [f"teacher.cache={tmp_path}/cache"]
    # The teacher's part alone, on four ranks; the training then loads no teacher.
    alone = run_ranks(TRAIN, [*shared, f"run_dir={tmp_path}/none", *cached, "--cache-only"], 4)
    assert "teacher.cache: about " in alone and not (tmp_path / "none").exists()
    for name, overrides in (
        ("live", []),
        ("exact", cached),
        ("int8", [f"teacher.cache={tmp_path}/small", "teacher.cache_rows=int8"]),
    ):
        output = run_ranks(TRAIN, [*shared, f"run_dir={tmp_path / name}", *overrides])
        assert ("teacher.cache: about " in output) == (name == "int8")
    live, exact, int8 = (
        [line["metrics"] for line in records(tmp_path / name / "distill")]
        for name in ("live", "exact", "int8")
    )
    for metric in ("loss", "ar", "kl", "student_ce"):
        for a, b, c in zip(live, exact, int8, strict=True):
            # other micro-batches round the teacher's rows another way
            assert b[metric] == pytest.approx(a[metric], rel=0.02, abs=0.005), metric
            assert c[metric] == pytest.approx(a[metric], rel=0.02, abs=0.005), metric
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors"))
             for n in ("cache", "small")]  # fmt: skip
    assert sizes[1] < 0.62 * sizes[0]
    with pytest.raises(
        AssertionError, match="its rows belong to rows 'exact', this run has 'int8'"
    ):
        run_ranks(TRAIN, [*shared, f"run_dir={tmp_path}/no", *cached, "teacher.cache_rows=int8"])


def test_a_disk_without_room_is_refused_before_the_teacher_runs(tmp_path, pair, shards):
    recipe = make_recipe(tmp_path, pair, shards, [{"kind": "align", "steps": 2}])
    script = tmp_path / "full.py"
    script.write_text(
        "import sys, shutil\n"
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 9, 1)\n"
        "from launch.train import main\nsys.exit(main())\n"
    )
    with pytest.raises(AssertionError, match="0.00 GiB free; make room, or set teacher.cache_rows"):
        run_ranks(script, [recipe, f"teacher.cache={tmp_path}/cache"])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_baseline_reads_the_same_rows(tmp_path, pair, shards):
    recipe = make_recipe(tmp_path, pair, shards, [{"kind": "uld", "steps": 3}])
    run_ranks(TRAIN, [recipe, f"run_dir={tmp_path}/live"])
    run_ranks(TRAIN, [recipe, f"run_dir={tmp_path}/cached", f"teacher.cache={tmp_path}/cache"])
    live, cached = (records(tmp_path / name / "uld") for name in ("live", "cached"))
    assert json.loads((tmp_path / "cached/uld/start.json").read_text())["teacher"] == "cache"
    for a, b in zip(live, cached, strict=True):
        assert a["metrics"]["kd"] > 0
        for name in ("loss", "kd", "student_ce"):
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], rel=1e-5), name
