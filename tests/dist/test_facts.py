"""A whole distillation small enough for every commit: what must hold of its checkpoint holds.

One kind of question (which digit is this), so that the teacher is good after half a minute.
"""

import base64
import json

import pytest

from data_tools.builder import build
from data_tools.sources import digits
from genrecal_ds.analysis.__main__ import main as analyse
from genrecal_ds.analysis.probes import facts, main
from genrecal_ds.evaluate.__main__ import evaluate
from tests.fixtures import ROOT, run_ranks, write_recipe

pytestmark = pytest.mark.dist


def shards_of_single_digits(folder, split, count):
    arguments = {"split": split, "num_samples": count, "seed": 0, "kinds": "digit"}
    build(digits.Digits(split, count, 0, ("digit",)), folder, arguments=arguments)
    return folder


def train(folder, data, name, stages, student, teacher=None, lr=2e-3, **more):
    tree = dict(
        run_dir=str(folder / name), precision="fp32",
        student={"path": str(student), "max_length": 128},
        data={"train": str(data), "validation": str(folder / "heldout")}, **more,
        batch={"global_batch": 32, "micro_batch": 16},
        optimizer={"lr": lr, "final_lr": lr / 20}, stages=stages,
    )  # fmt: skip
    if teacher:
        tree["teacher"] = {"path": str(teacher), "max_length": 128}
    run_ranks(ROOT / "launch/train.py", [write_recipe(folder / f"{name}.yaml", **tree)])
    return folder / name


@pytest.mark.timeout(900)
def test_facts_of_the_method_hold_after_a_small_run(tmp_path, pair):
    data = shards_of_single_digits(tmp_path / "train", "train", 4000)
    held = shards_of_single_digits(tmp_path / "heldout", "heldout", 128)
    pretrain = [{"kind": "pretrain", "steps": 250}]
    teacher = train(tmp_path, data, "teacher", pretrain, pair / "teacher_init")
    # An odd number of samples: one rank has one more than the other.
    log = {"evaluate_every": 60, "evaluation_samples": 37, "evaluation_tokens": 8}
    student = train(tmp_path, data, "student", [{"kind": "pretrain", "steps": 120}],
                    pair / "student_init", lr=3e-3, log=log)  # fmt: skip
    lines = [json.loads(line) for line in (student / "pretrain/metrics.jsonl").open()]
    in_loop = {line["step"]: line["metrics"].get("evaluation/overall") for line in lines}
    assert [step for step, value in in_loop.items() if value is not None] == [60, 120]
    teacher, student = teacher / "pretrain/student", student / "pretrain/student"
    score = evaluate(teacher, held, tmp_path / "score.json")["scores"]["overall"]["score"]
    last = evaluate(student, held, tmp_path / "37.json", limit=37, max_new_tokens=8)["scores"]
    assert in_loop[120] == pytest.approx(last["overall"]["score"]) and in_loop[120] > 0.2
    assert score > 0.75  # chance is .1: without a teacher that knows there is nothing to test

    stages = [{"kind": "align", "steps": 200}, {"kind": "distill", "steps": 60}]
    log = {"probes_every": 20}
    run = train(tmp_path, data, "genrecal", stages, student, teacher, lr=1e-3, log=log)
    for stage in ("align", "distill"):
        last = json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["warnings"] == [], last
        values = last["metrics"]
        assert values["probe/kl_shuffled_boundary"] > 2 * values["kl_boundary"]
        assert values["probe/kl_zeroed_boundary"] > 2 * values["kl_boundary"]
        assert abs(values["probe/ar_zeroed_other"] - values["ar_other"]) < 0.1
    out = tmp_path / "probes.json"
    arguments = [str(teacher), str(run / "align"), str(run / "distill"), str(held)]
    assert main([*arguments, "--out", str(out)]) == 0
    probes = json.loads(out.read_text())
    assert probes.keys() == {"align", "distill"}
    for stage, values in probes.items():
        for fact, holds in facts(values).items():
            assert holds, f"after {stage} not: {fact}: {values}"

    # Figure 7: the regularizer is what makes the diagonal stand out.
    bare = [{"kind": "align", "steps": 200, "losses": {"regularizer": "none"}}]
    without = train(tmp_path, data, "without", bare, student, teacher, lr=1e-3)
    out, predictions = tmp_path / "figures", []
    for name, folder in (("teacher", teacher), ("student", run / "distill/student")):
        evaluate(folder, held, tmp_path / f"{name}.json")
        file = tmp_path / f"{name}.predictions.jsonl"
        predictions += ["--predictions", f"{name}={folder}={file}"]
    arguments = [str(run), str(held), "--against", str(without), "--out", str(out)]
    assert analyse([*arguments, *predictions]) == 0
    found = json.loads((out / "analysis.json").read_text())
    leads = [c["diagonal"] - c["off_diagonal"] for c in found["cosines"].values()]
    assert leads[0] > leads[1] + 0.1, found["cosines"]
    assert found["own_ce"]["teacher"] < found["own_ce"]["student"]
    assert found["calibration"]["teacher"]["right"] > found["calibration"]["teacher"]["wrong"]
    assert sum(found["errors"]["kinds"]["digit"].values()) == 128
    page = (out / "analysis.html").read_text()
    for name in ("losses", "cosines", "features"):
        picture = (out / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
