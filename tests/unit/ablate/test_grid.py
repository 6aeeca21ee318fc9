"""Grids: what they refuse, which runs they are, and the tables of what is there."""

import json

import pytest
import yaml
from scipy.stats import ttest_rel

from genrecal_ds.ablate.__main__ import main
from genrecal_ds.ablate.grid import Grid, claim, load_grid, runs_of, stage_seeds
from genrecal_ds.ablate.probes import last_probes, probe_tables
from genrecal_ds.ablate.table import markdown, mean_of, paired, tables_of
from genrecal_ds.analysis.report import render
from genrecal_ds.console.arguments import share
from genrecal_ds.errors import UserError
from tests.fixtures import ROOT, recipe_tree, write_recipe

pytestmark = pytest.mark.unit

STAGES = [{"kind": "align", "steps": 2}, {"kind": "distill", "steps": 2}]
STUDY = {
    "conditions": {"clean": {}, "35 % wrong": {"overrides": ["optimizer.lr=0.5"]}},
    "measures": {"short": ["place", "read"], "reasoning": ["largest"]},
    "controls": ["SFT", "no L_ar"],
    "overrides": ["optimizer.final_lr=0.1"],
}
# condition, arm: each seed's scores of place, read and largest, of 10, 30 and 40 questions
SCORES = {
    ("clean", "all"): [(0.7, 0.9, 0.6), (0.8, 1.0, 0.5)],
    ("clean", "no L_ar"): [(0.3, 0.5, 0.5), (0.4, 0.56, 0.6)],
    ("clean", "SFT"): [(0.2, 0.6, 0.3), (0.34, 0.7, 0.2)],
    ("35 % wrong", "all"): [(0.5, 0.5, 0.6), (0.5, 0.6, 0.6)],
    ("35 % wrong", "no L_ar"): [(0.5, 0.5, 0.1), (0.5, 0.6, 0.5)],
    ("35 % wrong", "SFT"): [(0.1, 0.1, 0.1), (0.1, 0.2, 0.1)],
}
COUNTS = {"place": 10, "read": 30, "largest": 40}


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
     ({"tables": {"T": []}}, "tables.T: Tuple should have at least 1 item"),
     ({"tables": {"Probes": ["all"]}}, "tables: two would be called 'Probes'; rename one"),
     ({"controls": ["none"]}, "controls: no arm 'none'"),
     ({"controls": ["all", "all"]}, "controls: one stands there twice"),
     ({"conditions": {"A b": {}, "a-b": {}}}, "conditions: two of them would share the folder a-b"),
     ({"conditions": {"a": {"override": []}}},
      "conditions.a.override: unknown key; did you mean overrides?"),
     ({"conditions": {"a": {"overrides": ["batch.micro=1"]}}},
      "condition a, arm all: .*did you mean micro_batch?"),
     ({"measures": {"m": []}}, "measures.m: Tuple should have at least 1 item"),
     ({"measures": {"m": ["read", "read"]}}, "measures.m: one stands there twice"),
     ({"measures": {"m": ["read", "box"]}},
      "measures.m: no question scored is of kind 'box'; there are column_sum, largest, place"),
     ({"measures": {"m": ["sum_text"]}, "limit": 1}, "measures.m: no question scored is of kind"),
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


@pytest.fixture
def study(grid_files, tmp_path):
    """(grid, its runs, all scored; the command that makes their tables)."""
    two, _, write = grid_files
    path = write(**STUDY)
    grid = load_grid(path)
    runs = runs_of(grid, two, tmp_path / "out")
    for run in runs:
        values = SCORES[run.condition, run.arm][grid.seeds.index(run.seed)]
        scores = {
            kind: {"score": value, "n": COUNTS[kind]}
            for kind, value in zip(COUNTS, values, strict=True)
        }
        right = sum(entry["score"] * entry["n"] for entry in scores.values())
        scores["overall"] = {"score": right / 80, "n": 80}
        run.folder.mkdir(parents=True)
        run.score.write_text(json.dumps({"scores": scores}))
        (run.folder / "seconds.json").write_text(f"{run.seed}")
    return grid, runs, [str(two), "--grid", str(path), "--out", str(tmp_path / "out"), "--table"]


def test_runs_of_every_arm_under_every_condition(study, tmp_path):
    _, runs, _ = study
    assert [(run.seed, run.condition, run.arm) for run in runs] == [
        (seed, condition, arm) for seed in (1, 2) for condition, arm in SCORES
    ]
    assert runs[4].folder == tmp_path / "out/35-wrong/no-l-ar/seed-1"
    assert runs[4].name == "35 % wrong, no L_ar, seed 1"
    clean, wrong = (run.facts for run in (runs[1], runs[4]))
    assert (clean["optimizer"]["lr"], wrong["optimizer"]["lr"]) == (1e-3, 0.5)
    assert {**clean, "optimizer": 0} == {**wrong, "optimizer": 0}


def test_a_condition_holds_over_an_arms_own_keys(grid_files, tmp_path):
    two, _, write = grid_files
    arms = {"own": {"overrides": ["optimizer.lr=0.25"]}}
    path = write(arms=arms, conditions=STUDY["conditions"])
    rates = [run.facts["optimizer"]["lr"] for run in runs_of(load_grid(path), two, tmp_path)]
    assert rates[:2] == [0.25, 0.5]


def test_a_measure_is_the_mean_over_its_questions():
    scores = {"place": {"score": 0.2, "n": 10}, "read": {"score": 0.6, "n": 30},
              "largest": {"score": 1.0, "n": 40}, "overall": {"score": 0.75, "n": 80}}  # fmt: skip
    assert mean_of(scores, ("place", "read")) == pytest.approx((2 + 18) / 40)
    assert mean_of(scores, tuple(COUNTS)) == pytest.approx(mean_of(scores, None))


def test_differences_to_every_control_by_condition_and_measure(study):
    grid, runs, _ = study
    tables = tables_of(grid, runs)
    assert list(tables) == [
        f"All arms, {condition}{measure}"
        for condition in ("clean", "35 % wrong") for measure in ("", ", short", ", reasoning")
    ]  # fmt: skip
    short = {arm: [(10 * s[0] + 30 * s[1]) / 40 for s in SCORES["clean", arm]] for arm in grid.arms}
    row = tables["All arms, clean, short"][0]
    assert (row.arm, row.condition, row.measure, row.seconds) == ("all", "clean", "short", 1.5)
    assert list(row.scores.values()) == pytest.approx(short["all"])
    assert list(row.minus) == ["SFT", "no L_ar"]
    for control, found in row.minus.items():
        test = ttest_rel(short["all"], short[control])
        interval = test.confidence_interval(0.95)
        mean = sum(short["all"]) / 2 - sum(short[control]) / 2
        assert found == pytest.approx((mean, interval.low, interval.high))


def test_an_arm_above_every_control_is_marked(study):
    grid, runs, _ = study
    tables = tables_of(grid, runs)
    marked = {title: [row.arm for row in rows if row.is_above] for title, rows in tables.items()}
    # With wrong labels all is above SFT for sure, above no L_ar only on the mean.
    assert marked == {
        "All arms, clean": [], "All arms, clean, short": ["all"], "All arms, clean, reasoning": [],
        "All arms, 35 % wrong": [], "All arms, 35 % wrong, short": [],
        "All arms, 35 % wrong, reasoning": [],
    }  # fmt: skip
    assert tables["All arms, 35 % wrong"][0].minus["SFT"][1] > 0
    _, text = markdown(tables).split("### All arms, clean, short\n")
    short, reasoning = text.split("### All arms, clean, reasoning\n")
    reasoning = reasoning.split("###")[0]
    explained = "\\* above every control, each interval without zero\n"
    assert "| minus SFT [95 %] | minus no L_ar [95 %] | s |" in short
    assert "| all | 2 | 0.900 +- 0.071 * | 0.850 0.950 | +" in short and short.count("*") == 2
    assert explained in short and "*" not in reasoning
    assert "| SFT | 2 | 0.250 +- 0.071 | 0.300 0.200 |  | -0.300 [" in reasoning


def write_log(run, stage, *records):
    path = run.folder / stage / "metrics.jsonl"
    path.parent.mkdir()
    lines = [{"step": step, "metrics": metrics} for step, metrics in enumerate(records, start=1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_probes_of_the_last_stage_that_has_any(study, capsys):
    grid, runs, command = study
    first, second = (runs[0], runs[6])  # clean, all
    assert (first.arm, second.arm, second.seed) == ("all", "all", 2) and not last_probes(first)
    probed = {"kl_boundary": 0.5, "probe/kl_shuffled_boundary": 6.0, "gradient/student_ce": 2.0}
    write_log(first, "align", {"kl_boundary": 8.0, "probe/kl_zeroed_boundary": 9.0})
    write_log(first, "distill", {"probe/kl_shuffled_boundary": 1.0}, probed, {"kl_boundary": 0.1})
    write_log(second, "align", {"kl_boundary": 1.5, "probe/kl_shuffled_boundary": 8.0})
    write_log(second, "distill", {"kl_boundary": 0.2})
    assert last_probes(first) == probed
    (row,) = probe_tables(grid, runs)["Probes, clean"]
    means = {"kl_boundary": 1.0, "probe/kl_shuffled_boundary": 7.0, "gradient/student_ce": 2.0}
    assert (row.arm, row.num_seeds, row.means) == ("all", 2, means)
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "| all | 2 | 1 | 7 | - | - | - | - | - | - | 2 |" in text.split("### Probes, clean\n")[1]
    assert "Probes, 35 % wrong" not in text
    second.score.unlink()  # a run that is not done: its last probes are not its last
    assert probe_tables(grid, runs)["Probes, clean"][0].num_seeds == 1


def test_tables_for_programs_and_the_reports_page(study, tmp_path, capsys):
    _, runs, command = study
    write_log(runs[0], "align", {"probe/kl_shuffled_boundary": 6.0})
    assert main(command) == 0
    assert (tmp_path / "out/tables.md").read_text() == capsys.readouterr().out
    tables = json.loads((tmp_path / "out/tables.json").read_text())
    row = tables["All arms, clean, short"][0]
    assert row["is_above"] and row["minus"]["SFT"][1] > 0 and row["paired"] is None
    probes = {"arm": "all", "condition": "clean", "num_seeds": 1,
              "means": {"probe/kl_shuffled_boundary": 6.0}}  # fmt: skip
    assert tables["Probes, clean"] == [probes]
    score = {"overall": {"score": 0.5, "low": 0.4, "high": 0.6}}
    report = {"teacher": score, "students": {}, "probes": {}, "seconds": {}, "versions": {}}
    page = render(report | {"tables": [tables]}, {}, [], {})
    assert "All arms, 35 % wrong, reasoning" in page and "Probes, clean" not in page


def test_shares_cover_all_runs_once():
    runs = list(range(11))
    parts = [runs[i::n] for i, n in map(share, ("0/4", "1/4", "2/4", "3/4"))]
    assert sorted(sum(parts, [])) == runs
    for text in ("4/4", "1", "-1/2", "a/b"):
        with pytest.raises(Exception, match="is not I/N"):
            share(text)


def test_packaged_grids_are_valid():
    paths = sorted((ROOT / "launch/grids").glob("*.yaml"))
    grids = {path.name: load_grid(path) for path in paths}
    assert len(grids) >= 2 and all(isinstance(grid, Grid) for grid in grids.values())
    demo = grids["demo.yaml"]
    assert set(sum(demo.tables.values(), ())) == set(demo.arms)
