"""Wherever the teacher lies, and however many micro-batches it takes at once: the same losses."""

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
        "offload": ["deepspeed.teacher=teacher_zero3_offload", "teacher.forward_batches=2"],
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
