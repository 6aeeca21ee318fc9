"""A small grid through its command: trained, scored, gone on with after a failure."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.fixtures import ROOT, environment, recipe_tree, write_recipe

pytestmark = pytest.mark.dist


def test_a_grid_goes_on_after_a_failure(tmp_path, pair, shards):
    stages = [{"kind": "sft", "name": "first", "steps": 1}, {"kind": "sft", "steps": 1}]
    recipe = write_recipe(
        tmp_path / "recipe.yaml", **recipe_tree(tmp_path, pair, shards, stages=stages)
    )
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    tree = {
        "shards": str(shards / "validation"), "seeds": [1], "max_new_tokens": 4, "limit": 8,
        "arms": {"SFT": {}, "high": {"overrides": ["optimizer.lr=0.01"]}},
    }  # fmt: skip
    grid.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "genrecal_ds.ablate", str(recipe), "--grid", str(grid),
               "--out", str(out), "--jobs", "2"]  # fmt: skip

    def run():
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
        )

    (out / "high/seed-1").mkdir(parents=True)
    (out / "high/seed-1/sft").write_text("a file where a stage's folder would be\n")
    first = run()
    assert first.returncode == 1, first.stderr
    assert "error: high, seed 1: exit" in first.stderr and "output.log" in first.stderr
    assert "partial: 1 of 2 runs" in first.stdout
    kept = (out / "sft/seed-1/score.json").stat().st_mtime_ns
    (out / "high/seed-1/sft").unlink()
    second = run()
    assert second.returncode == 0, second.stderr
    assert "SFT, seed 1: done before" in second.stdout
    assert "partial" not in (out / "tables.md").read_text()
    assert (out / "sft/seed-1/score.json").stat().st_mtime_ns == kept
    assert json.loads((out / "high/seed-1/score.json").read_text())["scores"]["overall"]["n"] == 8
    ledger = [(out / arm / "seed-1/sft/metrics.jsonl").read_text() for arm in ("sft", "high")]
    assert all(json.loads(line)["step"] == 1 for line in ledger)
