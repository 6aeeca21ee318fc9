"""Wherever the teacher lies, and however many micro-batches it takes at once: the same losses."""

import json

import pytest

from tests.fixtures import ROOT, recipe_tree, records, run_ranks, write_recipe

pytestmark = pytest.mark.dist


def test_every_placement_gives_the_same_losses(tmp_path, pair, shards):
    """Two ranks, two micro-batches a step; validation, which takes one at a time, included."""
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "distill", "steps": 3}])
    tree["data"]["validation"] = tree["data"]["train"]  # one cache for both
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    variants = {
        "zero3": [],
        "forward_batches": ["teacher.forward_batches=2"],
        "offload": [
            "teacher.placement=zero3_offload",
            "deepspeed.teacher=null",
            "teacher.forward_batches=2",
        ],
        "replica": ["teacher.placement=replica", "teacher.forward_batches=4"],
        "cache": [f"teacher.cache={tmp_path}/cache"],
    }
    for name, overrides in variants.items():
        run_ranks(ROOT / "launch/train.py", [recipe, f"run_dir={tmp_path / name}", *overrides])
    expected = records(tmp_path / "zero3/distill")
    for name in variants:
        for line, own in zip(expected, records(tmp_path / name / "distill"), strict=True):
            for metric, value in line["metrics"].items():
                assert own["metrics"][metric] == pytest.approx(value, rel=1e-5), (name, metric)
            assert own["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-5), name


def test_shares_within_a_host_are_gathered_within_it(tmp_path, pair, shards):
    """Four ranks that believe to be two hosts."""
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "distill", "steps": 2}])
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    script, wire = ROOT / "tests/dist/ranks_measure.py", {}
    for placement in ("zero3", "zero3_host"):
        run = [recipe, f"run_dir={tmp_path / placement}", f"teacher.placement={placement}"]
        run_ranks(script, [tmp_path / placement / "measured", "2", *run], 4)
        measured = json.loads((tmp_path / placement / "measured/rank0.json").read_text())
        wire[placement] = measured["wire"]["teacher"]
    own, expected = (
        [line["metrics"] for line in records(tmp_path / name / "distill")]
        for name in ("zero3_host", "zero3")
    )
    assert own == [pytest.approx(line, rel=1e-5) for line in expected]
    # What the student's engine fetches before its own phase begins goes over all four.
    student = wire["zero3_host"]["4"]
    assert set(wire["zero3"]) == {"4"} and student < wire["zero3"]["4"] / 4
    # of the teacher's bytes 3/4 come from others, or 1/2; shares are rounded up
    expected = (wire["zero3"]["4"] - student) * 2 / 3
    assert wire["zero3_host"]["2"] == pytest.approx(expected, rel=0.01)
