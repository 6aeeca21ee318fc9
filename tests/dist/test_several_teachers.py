"""Two teachers, of two families and tokenizers, over one student, on two ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from launch.demo.pair import build_student
from tests.dist.test_gradients import LEAN, PACK, check_gradients, recipe_for
from tests.fixtures import ROOT, recipe_tree, records, run_ranks, texts_of_digits, write_recipe

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def second(pair, tmp_path_factory):
    """An InternVL of another width, whose tokenizer knows other words."""
    folder = tmp_path_factory.mktemp("second") / "teacher"
    torch.manual_seed(3)
    build_student([f"{text} of them" for text in texts_of_digits(60)], folder, width=96)
    files = [path / "tokenizer.json" for path in (folder, pair / "student_init")]
    assert files[0].read_text() != files[1].read_text()
    return folder


@pytest.mark.parametrize(
    "kind, student, placement, student_keys, trained",
    [("align", "student_init", "replica", PACK, {"parts"}),
     ("distill", "student_init", "zero3", {}, {"student", "parts"}),
     ("both rows", "student_untied", "replica", LEAN, {"student", "parts"}),
     ("byte_kd", "student_init", "zero3", LEAN, {"student"}),
     pytest.param("byte_kd", "student_untied", "replica", {}, {"student"},
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_gradients_are_the_weighted_sum(
    tmp_path, pair, shards, second, kind, student, placement, student_keys, trained
):
    more = {"path": str(second), "max_length": 128, "weight": 3.0, "placement": placement}
    recipe = recipe_for(
        tmp_path, pair, shards, student, kind, {"weight": 2.0}, student_keys,
        more_teachers=[more],
    )  # fmt: skip
    run_ranks(ROOT / "tests/dist/ranks_gradients.py", [recipe, "tested", tmp_path / "result.pt"])
    result = torch.load(tmp_path / "result.pt")
    check_gradients(recipe, result)
    assert {name.split(".")[0] for name in result["gradients"]} == trained
    assert result["still_whole"] == [], "parameters stay gathered after the step"
    term = "kd" if kind == "byte_kd" else "kl"
    assert {term, f"teacher2/{term}_boundary"} <= result["metrics"].keys()
    assert "teacher2/student_ce" not in result["metrics"]
    assert (tmp_path / "tested_export/recalibrator_2").is_dir() == (kind != "byte_kd")


def test_all_stages_and_a_resume_leave_the_same_bytes(tmp_path, pair, shards, second):
    """And distill goes on with both of align's Recalibrators: its rate cannot move them far."""
    small = {"lr": 1e-4, "final_lr": 1e-4}
    tree = recipe_tree(
        tmp_path, pair, shards, checkpoint={"every": 2, "keep": 9},
        more_teachers=[{"path": str(second), "max_length": 128, "placement": "replica"}],
        stages=[
            {"kind": "align", "steps": 2, "lr": 0.02, "final_lr": 0.02},
            {"kind": "distill", "steps": 4, **small,
             "answers": {"rows": "both", "noise": 0.1}},
            {"kind": "byte_kd", "steps": 4, "losses": {"student_ce": 0.0},
             "on_policy": {"share": 0.6, "max_new_tokens": 6}},
            {"kind": "sft", "steps": 2},
        ],
    )  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    train, run = ROOT / "launch/train.py", tmp_path / "run"
    run_ranks(train, [recipe])
    check_recalibrators(run, [pair / "teacher_init", second])
    line = records(run / "distill")[-1]
    assert {"teacher2/aligned_kl", "validation/teacher2/ar"} <= line["metrics"].keys()
    assert json.loads((run / "align/start.json").read_text())["teacher"] == "zero3, replica"

    left = sorted(run.glob("*/student/model.safetensors")) + sorted(run.glob("*/rec*/*tensors"))
    before = {path: path.read_bytes() for path in left}
    assert len(before) == 8
    for stage in ("distill", "byte_kd", "sft"):
        (run / stage / "DONE").unlink()
        for part in (run / stage).glob("[rs]*/"):
            shutil.rmtree(part)
    output = run_ranks(train, [recipe, "resume=step-00000002"])
    assert output.count("resumed at step 2") == 2  # sft is too short for a checkpoint
    assert {path: path.read_bytes() for path in left} == before


def check_recalibrators(run, teachers):
    for name, teacher in zip(("recalibrator", "recalibrator_2"), teachers, strict=True):
        facts = json.loads((run / "align" / name / "recalibrator.json").read_text())
        assert facts["teacher"] == str(teacher)
        aligned, distilled = (
            load_file(run / stage / name / "recalibrator.safetensors")
            for stage in ("align", "distill")
        )
        moved = max(float((distilled[key] - aligned[key]).abs().max()) for key in aligned)
        assert 0 < moved < 2e-3
