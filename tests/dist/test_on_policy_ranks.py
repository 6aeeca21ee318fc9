"""Answers that the student gives itself, on two ranks: the same after a resume, by any kind."""

import shutil

import pytest

from tests.fixtures import ROOT, recipe_tree, records, run_ranks, write_recipe

pytestmark = pytest.mark.dist
OWN = {"share": 0.6, "max_new_tokens": 6}
STAGES = {
    "byte_kd": {"kind": "byte_kd", "losses": {"student_ce": 0.0}},
    "distill": {"kind": "distill", "losses": {"student_ce": 0.0, "ar": 0.0}},
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_resumed_run_draws_the_same_answers(tmp_path, pair, shards, kind):
    tree = recipe_tree(
        tmp_path, pair, shards, checkpoint={"every": 2, "keep": 9},
        stages=[{**STAGES[kind], "steps": 4, "on_policy": OWN}],
    )  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    train, run = ROOT / "launch/train.py", tmp_path / "run"
    run_ranks(train, [recipe])
    log, weights = records(run / kind), (run / kind / "student/model.safetensors").read_bytes()
    assert all("on_policy" in line["phases"] for line in log)
    (run / kind / "DONE").unlink()
    shutil.rmtree(run / kind / "student")
    output = run_ranks(train, [recipe, "resume=step-00000002"])
    assert "resumed at step 2" in output
    assert (run / kind / "student/model.safetensors").read_bytes() == weights
    given = run_ranks(train, [recipe, f"stages.{kind}.on_policy.share=0", f"run_dir={tmp_path}/g"])
    assert given and [line["tokens"] for line in records(tmp_path / "g" / kind)] != [
        line["tokens"] for line in log
    ]
