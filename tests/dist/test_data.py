"""Data in real two-rank runs: measured lengths, the incomplete batch, new data, damaged data."""

import json
import shutil
from pathlib import Path

import pytest

from data_tools.tokens import main as tokens
from genrecal_ds.data.index import ShardIndex
from tests.dist.test_stages import recipe_tree
from tests.fixtures import ROOT, build_digit_shards, run_ranks, write_recipe

pytestmark = pytest.mark.dist


def records(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def run(recipe: Path, *overrides: str) -> str:
    return run_ranks(ROOT / "launch/train.py", [recipe, *overrides])


def test_new_data_is_refused_or_begins_a_new_epoch(tmp_path, pair):
    data = build_digit_shards(tmp_path / "data", "train", 20)
    models = ["--student", str(pair / "student_init")]  # no stage has a teacher
    assert tokens([str(data), *models]) == 0
    tree = recipe_tree(
        tmp_path, pair, tmp_path, checkpoint={"every": 2, "keep": 9},
        data={"train": str(data), "lengths": "measured", "num_workers": 1},
        stages=[{"kind": "sft", "steps": 4}],
    )  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    run(recipe)
    stage = tmp_path / "run/sft"
    whole = records(stage)
    assert [record["batch_share"] for record in whole] == [1, 1, 0.5, 1], "20 samples, batches of 8"
    for record in whole:  # the incomplete batch weighs what its samples weigh
        expected = record["batch_share"] * record["metrics"]["student_ce"]
        assert record["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert whole[-1]["left_out"] == {"seen": 28, "unusable": 0, "unreadable": 0, "truncated": 0}

    (stage / "DONE").unlink()
    manifest = json.loads((stage / "checkpoints/step-00000002/manifest.json").read_text())
    assert manifest["plan"]["lengths"].endswith(":student<=128"), "a table's hash, not estimates"
    shutil.rmtree(data)
    build_digit_shards(data, "train", 20, seed=1)
    with pytest.raises(AssertionError, match="no table of this pair's token counts|make the table"):
        run(recipe)
    assert tokens([str(data), *models]) == 0
    with pytest.raises(AssertionError, match="was written with data .* resume=new_data"):
        run(recipe)
    moved = data.rename(tmp_path / "moved")
    place = f"data.train={moved}"
    # a step past the end of the checkpoint's epoch: its plan must not be mixed with the new one
    output = run(recipe, place, "resume=new_data", "stages.sft.steps=4", "log.every=1")
    assert "resumed at step 2" in output or "resumed at step 4" in output
    assert "began an epoch of the new data there" in output
    last = records(stage)[-1]
    assert last["step"] == 4 and ShardIndex.load(moved).fingerprint != manifest["data"]


def test_too_many_damaged_samples_end_the_run_on_every_rank(tmp_path, pair):
    data = build_digit_shards(tmp_path / "data", "train", 64)
    shard = data / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"kind"', b'"Kind"'))
    tree = recipe_tree(
        tmp_path, pair, tmp_path, data={"train": str(data)}, stages=[{"kind": "sft", "steps": 8}]
    )
    with pytest.raises(AssertionError) as caught:
        run(write_recipe(tmp_path / "r.yaml", **tree))
    assert "16 of 16 samples are damaged, more than data.max_unreadable 0.001" in str(caught.value)
    assert "exit 2" in str(caught.value) and "skipped" in str(caught.value)
    assert not (tmp_path / "run/sft/DONE").exists()
