"""Recipes: every mistake is one line that names the file, the key and the fix; exit code 2."""

import json
import subprocess
import sys

import pytest
import yaml

from genrecal_ds.errors import UserError
from genrecal_ds.recipe.recipe_file import load_ds_config, load_recipe
from tests.fixtures import ROOT, environment

pytestmark = pytest.mark.unit

GOOD = {
    "run_dir": "runs/x",
    "teacher": {"path": "t"},
    "student": {"path": "s"},
    "data": {"train": "d"},
    "batch": {"global_batch": 8, "micro_batch": 2},
    "stages": [{"kind": "align", "steps": 3}, {"kind": "distill", "epochs": 1}],
}


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def test_a_good_recipe_with_overrides(tmp_path):
    recipe = load_recipe(
        write(tmp_path), ["stages.align.steps=9", "optimizer.lr=3e-4", "stages.1.losses.ar=0"]
    )
    assert recipe.stages[0].steps == 9 and recipe.optimizer.lr == 3e-4
    assert recipe.stages[1].losses.ar == 0 and recipe.stages[1].losses.kl == 1
    assert [recipe.accumulation_steps(stage, 2) for stage in recipe.stages] == [2, 2]


def test_environment_variables_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/somewhere")
    recipe = load_recipe(write(tmp_path, data={"train": "${DATA}/train"}))
    assert str(recipe.data.train) == "/somewhere/train"


def test_sources_of_stages_default_to_the_stage_before(tmp_path):
    stages = [{"kind": "align", "steps": 1}, {"kind": "distill", "steps": 1},
              {"kind": "sft", "steps": 1}, {"kind": "sft", "name": "again", "steps": 1,
                                            "student": "stage:distill"}]  # fmt: skip
    recipe = load_recipe(write(tmp_path, stages=stages))
    assert [recipe.student_source(s) for s in recipe.stages] == [
        "s", "stage:align", "stage:distill", "stage:distill",
    ]  # fmt: skip
    assert [recipe.recalibrator_source(s) for s in recipe.stages] == [
        None, "stage:align", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": {"global_batch": 8, "micro_batch": 2, "micro_bach": 1}},
         "batch.micro_bach: unknown key; did you mean micro_batch"),
        ({"lr": 1}, "lr: unknown key"),
        ({"stages": [{"kind": "sft", "stepz": 1}]}, "stages.0.stepz: .* did you mean steps"),
        ({"stages": [{"kind": "sft", "steps": 1, "losses": {"kll": 1}}]}, "did you mean kl"),
        ({"batch": {"global_batch": "many", "micro_batch": 2}}, "batch.global_batch: .*'many'"),
        ({"precision": "fp16"}, "precision: .*'fp16'"),
        ({"teacher": None}, "stages.align: kind align needs teacher.path"),
        ({"teacher": {"path": "s"}}, "same folder; name two models"),
        ({"stages": []}, "stages"),
        ({"recalibrator": {"positions": "own"}, "teacher": {"path": "t", "cache": "c"}},
         "teacher.cache: holds no question, so recalibrator.positions must be new"),
        ({"log": {"evaluate_every": 5}}, "log.evaluate_every: needs data.validation"),
        ({"teacher": None, "stages": [{"kind": "dskd", "steps": 1}]},
         "stages.dskd: kind dskd needs teacher.path"),
        ({"stages": [{"kind": "align", "steps": 1, "epochs": 1}]}, "exactly one of steps"),
        ({"stages": [{"kind": "sft", "steps": 1}] * 2}, "duplicate name"),
        ({"stages": [{"kind": "sft", "steps": 1, "student": "stage:distill"}]}, "not an earlier"),
        ({"stages": [{"kind": "align", "steps": 1, "losses": {"ar": 0, "kl": 0}}]}, "both 0"),
        ({"student": {}}, "student.path: missing; add it"),
        ({"stages": [{"kind": "sfd", "steps": 1}]}, "no kind of stage; there are pretrain, align"),
        ({"stages": [{"kind": "align", "steps": 1, "train": ["layers"]}]},
         "align trains the Recalibrator only"),
        ({"stages": [{"kind": "uld", "steps": 1, "on_policy": {"share": 0.5}}]},
         "on_policy: only for distill and byte_kd; this stage is uld"),
        ({"stages": [{"kind": "distill", "steps": 1, "on_policy": {"share": 0.5}}]},
         "set losses.student_ce and losses.ar to 0"),
        ({"more_teachers": [{"path": "u"}]}, "more_teachers: removed after 0.1.0, a run has one"),
        ({"teacher": {"path": "t", "weight": 2}}, "teacher.weight: removed after 0.1.0"),
        ({"teacher": {"path": "t", "answer_layer": 2}}, "teacher.answer_layer: removed after 0.1"),
        ({"teacher_head": "gathered"}, "teacher_head: removed after 0.1.0, the teacher's head is"),
        ({"stages": [{"kind": "align", "steps": 1, "answers": {"rows": "both"}}]},
         "stages.0.answers: removed after 0.1.0, no result supports it"),
        ({"stages": [{"kind": "align", "steps": 1, "losses": {"boundary_weight": 2}}]},
         "stages.0.losses.boundary_weight: removed after 0.1.0, no result supports it"),
    ],
)  # fmt: skip
def test_mistakes_name_key_and_fix(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_recipe(write(tmp_path, **changes))
    assert "\n" not in str(error.value) and "recipe.yaml" in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [("stages.sft.steps=1", "no stage 'sft'"), ("seed", "write key=value"),
     ("run_dir.x=1", "not a section")],
)  # fmt: skip
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path), [override])


def test_global_batch_must_divide_and_the_message_lists_sizes_that_do(tmp_path):
    recipe = load_recipe(write(tmp_path, batch={"global_batch": 10, "micro_batch": 2}))
    with pytest.raises(UserError, match="sizes that are: 6, 12, 18"):
        recipe.accumulation_steps(recipe.stages[0], world_size=3)


def test_every_ds_config_loads_and_owns_no_number_of_the_recipe():
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(files) >= 4
    for file in files:
        assert load_ds_config(file.stem)["zero_optimization"]["stage"] == 3


def test_ds_config_that_states_a_batch_size_is_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"train_batch_size": 8}))
    with pytest.raises(UserError, match="belongs to the recipe"):
        load_ds_config(str(path))
    with pytest.raises(UserError, match="packaged names: .*student_zero3"):
        load_ds_config("studnet_zero3")


def test_every_packaged_recipe_is_valid():
    recipes = sorted((ROOT / "launch/recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        load_recipe(path)


def run_train(*arguments, **env):
    return subprocess.run(
        [sys.executable, "launch/train.py", *map(str, arguments)],
        cwd=ROOT, env=environment(**env), capture_output=True, text=True,
    )  # fmt: skip


def test_command_exits_2_with_one_line(tmp_path, pair, shards, capsys):
    """The mistakes that need folders; none of them loads a model."""
    real = {
        "teacher": {"path": str(pair / "teacher_init")},
        "student": {"path": str(pair / "student_init")},
        "data": {"train": str(shards / "train")},
        "run_dir": str(tmp_path / "run"),
    }
    no_end = tmp_path / "no_end"
    no_answers = tmp_path / "no_answers"
    for folder in (no_end, no_answers):
        folder.mkdir()
        for file in (pair / "student_init").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    template = (no_end / "chat_template.jinja").read_text()
    (no_end / "chat_template.jinja").write_text(template.replace("<end>", "</image>"))
    (no_answers / "chat_template.jinja").write_text("{{ messages | length }}")
    empty = tmp_path / "empty"
    empty.mkdir()
    manifest = json.loads((shards / "train/manifest.json").read_text())
    (empty / "manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    cases = [
        ({}, "error: student.path: s has no config.json"),
        ({**real, "data": {"train": "nowhere"}}, "data.train: nowhere has no manifest.json"),
        ({**real, "batch": {"global_batch": 7, "micro_batch": 2}}, "sizes that are: 6, 8, 10"),
        ({**real, "student": {"path": str(no_end)}}, "ends an answer with </image>"),
        (
            {**real, "student": {"path": str(no_answers)}},
            "no chat can be taught by its chat template",
        ),
        ({**real, "data": {"train": str(empty)}}, "shards is empty"),
    ]
    from launch.train import main

    for number, (changes, message) in enumerate(cases):
        recipe = write(tmp_path, **changes)
        if number in (0, len(cases) - 1):  # before torch is imported, and after
            result = run_train(recipe)
            code, said = result.returncode, result.stderr
        else:  # in this process, which must not be redirected as a run's is
            code, said = main([str(recipe), "--dry-run"]), capsys.readouterr().err
        assert code == 2, said
        line = said.strip().splitlines()[-1]
        assert message in line, line
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()


def test_a_torch_out_of_range_is_refused(tmp_path, pair, shards, monkeypatch, capsys):
    from launch import checks, train

    monkeypatch.setattr(checks, "version", lambda package: "2.10.1+cu128")
    assert train.main([str(write(tmp_path))]) == 2
    assert "torch 2.10.1+cu128 is installed; genrecal_ds needs >= 2.11" in capsys.readouterr().err


def test_dry_run_prints_tree_and_what_trains(tmp_path, pair, shards):
    changes = {
        "teacher": {"path": str(pair / "teacher_init")},
        "student": {"path": str(pair / "student_init")},
        "data": {"train": str(shards / "train")},
    }
    result = run_train(write(tmp_path, **changes), "--dry-run", "seed=5")
    assert result.returncode == 0, result.stderr
    tree, _, stages = result.stdout.partition("stage align (align)")
    assert yaml.safe_load(tree)["seed"] == 5
    align, distill = stages.split("stage distill (distill)")
    assert "student.layers" in align and align.count("trains") == 1
    assert distill.count("trains") == 3  # layers, norm, recalibrator
    assert "recalibrator: packed qwen2 blocks, attention sdpa" in distill
