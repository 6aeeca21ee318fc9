"""Grids: what they refuse, which runs they are, and the tables of what is there."""

import json

import pytest
import yaml
from scipy.stats import ttest_rel

from genrecal_ds.ablate.__main__ import main
from genrecal_ds.ablate.grid import Grid, claim, load_grid, runs_of, stage_seeds
from genrecal_ds.ablate.table import markdown, paired, tables_of
from genrecal_ds.arguments import share
from genrecal_ds.errors import UserError
from tests.fixtures import recipe_tree, write_recipe

pytestmark = pytest.mark.unit

STAGES = [{"kind": "align", "steps": 2}, {"kind": "distill", "steps": 2}]


@pytest.fixture
def grid_files(tmp_path, pair, shards):
    """(recipe of two stages, another of one, a function that writes a grid)."""
    two = write_recipe(tmp_path / "two.yaml", **recipe_tree(tmp_path, pair, shards, stages=STAGES))
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 2}])
    one = write_recipe(tmp_path / "one.yaml", **tree)

    def write(**changes):
        arms = {"all": {}, "no L_ar": {"overrides": ["stages.align.losses.ar=0"]},
                "SFT": {"recipe": str(one)}}  # fmt: skip
        tree = {"shards": str(shards / "validation"), "seeds": [1, 2], "arms": arms, **changes}
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return two, one, write


def test_runs_seed_by_seed_with_the_same_last_samples(grid_files, tmp_path):
    two, one, write = grid_files
    runs = runs_of(load_grid(write()), two, tmp_path / "out")
    assert [(run.arm, run.seed) for run in runs] == [
        (arm, seed) for seed in (1, 2) for arm in ("all", "no L_ar", "SFT")
    ]
    assert runs[1].folder == tmp_path / "out/no-l-ar/seed-1"
    assert runs[1].student == runs[1].folder / "distill/student"
    assert runs[1].facts["stages"][0]["losses"]["ar"] == 0 != runs[0].facts["stages"][0]["losses"]
    seeds = [[stage["seed"] for stage in run.facts["stages"]] for run in runs]
    assert seeds[0] == seeds[1] == [1001, 1000] and seeds[2] == [1000] and seeds[5] == [2000]
    assert stage_seeds(3, 3) == [3002, 3001, 3000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": [1]}, "seed: unknown key; did you mean seeds?"),
     ({"seeds": [1, 1]}, "one stands there twice"),
     ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
     ({"arms": {"A b": {}, "a-b": {}}}, "two of them would share the folder a-b"),
     ({"arms": {"a": {"override": []}}}, "arms.a.override: unknown key; did you mean overrides?"),
     ({"tables": {"T": ["none"]}}, "tables.T: no arm 'none'"),
     ({"shards": "nowhere"}, "shards: nowhere has no manifest.json"),
     ({"arms": {"a": {"overrides": ["stages.sft.steps=1"]}}}, "arm a: .*no stage 'sft'"),
     ({"arms": {"a": {"overrides": ["batch.micro=1"]}}}, "arm a: .*did you mean micro_batch?"),
     ({"arms": {"a": {"recipe": "none.yaml"}}}, "arm a: none.yaml: no such recipe file")],
)  # fmt: skip
def test_refusals(grid_files, tmp_path, changes, message):
    two, _, write = grid_files
    with pytest.raises(UserError, match=message):
        runs_of(load_grid(write(**changes)), two, tmp_path / "out")


def test_another_recipe_in_a_runs_folder_is_refused(grid_files, tmp_path):
    two, _, write = grid_files
    for run in runs_of(load_grid(write()), two, tmp_path / "out"):
        claim(run)
        claim(run)
    (changed, *_) = runs_of(load_grid(write(overrides=["precision=bf16"])), two, tmp_path / "out")
    with pytest.raises(UserError, match="all/seed-1: holds results of another precision"):
        claim(changed)


def test_difference_of_seeds_is_the_paired_t_test():
    ours, theirs = {1: 0.60, 2: 0.70, 3: 0.64, 4: 0.2}, {3: 0.61, 2: 0.62, 1: 0.55}
    mean, low, high = paired(ours, theirs)
    test = ttest_rel([ours[seed] for seed in (1, 2, 3)], [theirs[seed] for seed in (1, 2, 3)])
    interval = test.confidence_interval(0.95)
    assert mean == pytest.approx((0.05 + 0.08 + 0.03) / 3)
    assert (low, high) == pytest.approx((interval.low, interval.high))
    assert paired({1: 0.5}, {1: 0.4}) is None


def test_tables_of_what_is_there(grid_files, tmp_path, capsys):
    two, _, write = grid_files
    path = write(tables={"One": ["SFT", "all"], "Other": ["all", "no L_ar"]})
    runs = runs_of(load_grid(path), two, tmp_path / "out")
    for run, score in zip(runs[:4], (0.5, 0.4, 0.3, 0.6), strict=False):
        run.folder.mkdir(parents=True)
        run.score.write_text(json.dumps({"scores": {"overall": {"score": score}}}))
        (run.folder / "seconds.json").write_text("7.0")
    text = markdown(tables_of(load_grid(path), runs))
    assert "### One (partial: 3 of 4 runs)" in text
    assert "| all | 2 | 0.550 +- 0.071 | 0.500 0.600 |  | 7 |" in text
    assert "| SFT | 1 | 0.300 | 0.300 |  | 7 |" in text
    command = [str(two), "--grid", str(path), "--out", str(tmp_path / "out"), "--table"]
    assert main(command) == 0 and text in capsys.readouterr().out
    assert json.loads((tmp_path / "out/tables.json").read_text())["One"][0]["arm"] == "SFT"


def test_shares_cover_all_runs_once():
    runs = list(range(11))
    parts = [runs[i::n] for i, n in map(share, ("0/4", "1/4", "2/4", "3/4"))]
    assert sorted(sum(parts, [])) == runs
    for text in ("4/4", "1", "-1/2", "a/b"):
        with pytest.raises(Exception, match="is not I/N"):
            share(text)


def test_packaged_grid_is_valid():
    from tests.fixtures import ROOT

    grid = load_grid(ROOT / "launch/grids/demo.yaml")
    assert isinstance(grid, Grid) and set(sum(grid.tables.values(), ())) == set(grid.arms)
