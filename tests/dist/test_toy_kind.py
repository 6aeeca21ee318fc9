"""A new objective is one file and one entry: a kind from outside trains, exports and is counted."""

import pytest
import torch
from safetensors.torch import load_file

from genrecal_ds.estimate import flops
from genrecal_ds.estimate.memory import estimate
from genrecal_ds.estimate.sizes import load_of
from genrecal_ds.recipe.kinds import KINDS, Kind
from genrecal_ds.recipe.recipe_file import load_recipe
from tests.fixtures import ROOT, recipe_tree, records, run_ranks, write_recipe

pytestmark = pytest.mark.dist


def test_a_kind_from_outside(tmp_path, pair, shards, monkeypatch):
    stages = [{"kind": "row_lengths", "name": "toy", "steps": 2}]
    tree = recipe_tree(tmp_path, pair, shards, stages=stages)
    recipe_file = write_recipe(tmp_path / "r.yaml", **tree)
    run_ranks(ROOT / "tests/dist/ranks_toy_kind.py", [recipe_file])

    first, second = (line["metrics"] for line in records(tmp_path / "run/toy"))
    for line in (first, second):
        assert line["loss"] == pytest.approx(line["student_ce"] + line["row_length"], rel=1e-4)
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (pair / "student_init", tmp_path / "run/toy/student")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers" in name for name in moved) and not any("vision" in name for name in moved)

    monkeypatch.setitem(KINDS, "row_lengths", Kind("tests.dist.toy_objective"))
    recipe = load_recipe(recipe_file)
    load = load_of(recipe, recipe.stages[0], gpus=2, per_host=2)
    assert estimate(load).gpu > 0 and flops.teacher_products(load) > 0
