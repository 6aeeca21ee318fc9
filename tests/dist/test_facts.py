"""A whole distillation small enough for every commit: what must hold of its checkpoint holds.

One kind of question (which digit is this), so that the teacher is good after half a minute.
"""

import json

import pytest

from data_tools.builder import build
from data_tools.sources import digits
from genrecal_ds.analysis.probes import facts, main
from genrecal_ds.evaluate.__main__ import evaluate
from tests.fixtures import ROOT, run_ranks, write_recipe

pytestmark = pytest.mark.dist


def shards_of_single_digits(folder, split, count):
    arguments = {"split": split, "num_samples": count, "seed": 0, "kinds": "digit"}
    build(digits.Digits(split, count, 0, ("digit",)), folder, arguments=arguments)
    return folder


def train(folder, data, name, stages, student, teacher=None, lr=2e-3):
    tree = dict(
        run_dir=str(folder / name), precision="fp32",
        student={"path": str(student), "max_length": 128}, data={"train": str(data)},
        batch={"global_batch": 32, "micro_batch": 16},
        optimizer={"lr": lr, "final_lr": lr / 20}, stages=stages,
    )  # fmt: skip
    if teacher:
        tree["teacher"] = {"path": str(teacher), "max_length": 128}
    run_ranks(ROOT / "launch/train.py", [write_recipe(folder / f"{name}.yaml", **tree)])
    return folder / name


def test_facts_of_the_method_hold_after_a_small_run(tmp_path, pair):
    data = shards_of_single_digits(tmp_path / "train", "train", 4000)
    held = shards_of_single_digits(tmp_path / "heldout", "heldout", 128)
    pretrain = [{"kind": "pretrain", "steps": 250}]
    teacher = train(tmp_path, data, "teacher", pretrain, pair / "teacher_init")
    student = train(tmp_path, data, "student", [{"kind": "pretrain", "steps": 120}],
                    pair / "student_init", lr=3e-3)  # fmt: skip
    teacher, student = teacher / "pretrain/student", student / "pretrain/student"
    score = evaluate(teacher, held, tmp_path / "score.json")["scores"]["overall"]["score"]
    assert score > 0.75  # chance is .1: without a teacher that knows there is nothing to test

    stages = [{"kind": "align", "steps": 200}, {"kind": "distill", "steps": 60}]
    run = train(tmp_path, data, "genrecal", stages, student, teacher, lr=1e-3)
    out = tmp_path / "probes.json"
    arguments = [str(teacher), str(run / "align"), str(run / "distill"), str(held)]
    assert main([*arguments, "--out", str(out)]) == 0
    probes = json.loads(out.read_text())
    assert probes.keys() == {"align", "distill"}
    for stage, values in probes.items():
        for fact, holds in facts(values).items():
            assert holds, f"after {stage} not: {fact}: {values}"
