"""The objective on one process: the boundary row, the switches of the terms, the report."""

import re
from dataclasses import replace

import pytest
import torch

from genrecal_ds.data.batch import collate
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.head import FrozenHead, load_final_norm, load_frozen_head
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.models.vlm import TeacherBody, load_vlm
from genrecal_ds.objectives.base import Ingredients, TeacherRows, Totals
from genrecal_ds.objectives.genrecal import GenRecal
from genrecal_ds.objectives.report import Clock
from genrecal_ds.objectives.supervised import Supervised
from genrecal_ds.recipe.stage_config import LossConfig, StageConfig
from tests.fixtures import ROOT

pytestmark = pytest.mark.unit


class Setting:
    """The tiny pair, one batch of eight samples, and the teacher's rows for it."""

    def __init__(self, pair, shards):
        self.teacher_folder = pair / "teacher_init"
        self.student_folder = pair / "student_init"
        self.teacher = TeacherBody(load_vlm(self.teacher_folder))
        head = load_frozen_head(self.teacher_folder, torch.float32, torch.device("cpu"))
        self.head = FrozenHead(head)
        self.encoders = PairEncoders(
            ChatEncoder(self.student_folder, 200), ChatEncoder(self.teacher_folder, 200)
        )
        reader = ShardReader(ShardIndex.load(shards / "train"))
        samples = [reader.read(i) for i in range(8)]
        self.pairs = [pair for s in samples for pair in self.encoders.encode(s.messages, s.images)]

    def batch(self, pairs=None, with_regular=False):
        placeholder = self.encoders.placeholder()
        rules = self.encoders.vision_rules
        return collate(self.pairs if pairs is None else pairs, placeholder, rules, with_regular)

    def parts(self, kind, losses=None, **more):
        """Ingredients of an objective, the student's weights as they are in its folder."""
        stage = StageConfig(kind=kind, steps=1, losses=losses or LossConfig())
        student = load_vlm(self.student_folder)
        return Ingredients(stage, student, self.encoders, Clock(), self.head, **more)

    def objective(self, losses=None, kind="distill"):
        torch.manual_seed(0)
        parts = self.parts(kind, losses)
        parts.student.train_only(parts.stage.trained_components)
        recalibrator = Recalibrator(
            parts.student.text_config, self.teacher.teacher.text_config.hidden_size
        )
        recalibrator.initialize(0.1, load_final_norm(self.teacher_folder))
        return GenRecal(replace(parts, recalibrator=recalibrator))

    @torch.no_grad()
    def rows(self, batch):
        return TeacherRows(*self.teacher(
            batch.teacher.inputs, batch.teacher.rows_A, batch.teacher.targets_N
        ))  # fmt: skip


@pytest.fixture(scope="module")
def setting(pair, shards):
    return Setting(pair, shards)


def run(setting, objective, batch, probe=False):
    loss, report = objective(batch, setting.rows(batch), Totals(1.0, 1.0), probe)
    return loss, report


def first_token_only(chat):
    """The same chat with the first answer cut to one token and nothing behind it."""
    start, _ = chat.answers[0]
    return EncodedChat(
        chat.input_ids_T[: start + 1], ((start, start + 1),),
        {k: v[: start + 1] for k, v in chat.per_token.items()}, chat.vision,
    )  # fmt: skip


def test_one_token_answers_teach_the_student(setting):
    """With a slice that forgets the last question row nothing would reach the student here."""
    pairs = [Pair(first_token_only(p.teacher), first_token_only(p.student)) for p in setting.pairs]
    objective = setting.objective(LossConfig(student_ce=0.0))
    loss, _ = run(setting, objective, setting.batch(pairs))
    loss.backward()
    gradients = [p.grad.norm() for p in objective.student.parameters() if p.requires_grad]
    assert sum(float(g) > 0 for g in gradients) > len(gradients) // 2


def test_zeroed_question_states_change_boundary_rows(setting):
    objective, batch = setting.objective(), setting.batch()
    with torch.no_grad():
        _, true = run(setting, objective, batch)
        objective.student.body = lambda *inputs: torch.zeros(
            *batch.student.inputs.input_ids.shape, objective.student.text_config.hidden_size
        )
        _, zeroed = run(setting, objective, batch)
    true, zeroed = true.reduce(), zeroed.reduce()
    assert abs(true["ar_boundary"] - zeroed["ar_boundary"]) > 1e-3
    assert abs(true["kl_boundary"] - zeroed["kl_boundary"]) > 1e-3


def test_report_splits_rows_and_their_weighted_mean_is_the_whole(setting):
    batch = setting.batch()
    _, report = run(setting, setting.objective(), batch)
    values = report.reduce()
    boundary = int(batch.teacher.boundary_N.sum())
    for name in ("ar", "kl"):
        whole = (
            boundary * values[f"{name}_boundary"]
            + (batch.num_teacher_rows - boundary) * values[f"{name}_other"]
        ) / batch.num_teacher_rows
        assert values[name] == pytest.approx(whole, rel=1e-5)
    assert values.keys() >= {"student_ce_boundary", "student_ce_other", "agree"}


@pytest.mark.parametrize(
    "losses, terms",
    [
        (LossConfig(), ("ar", "kl", "regular_ar", "regular_kl")),
        (LossConfig(ar=0), ("kl", "regular_ar", "regular_kl")),
        (LossConfig(kl=0), ("ar", "regular_ar", "regular_kl")),
        (LossConfig(regularizer="none"), ("ar", "kl")),
        (LossConfig(regularizer="ce"), ("ar", "kl", "regular_ar")),
        (LossConfig(regularizer="kl"), ("ar", "kl", "regular_kl")),
        (LossConfig(regularizer="mse"), ("ar", "kl", "regular_mse")),
    ],
)
def test_each_term_of_align_has_its_switch(setting, losses, terms):
    """The loss is exactly the sum of the terms that are on, over the rows."""
    with_regular = losses.regularizer != "none"
    batch = setting.batch(with_regular=with_regular)
    objective = setting.objective(losses, "align")
    loss, report = run(setting, objective, batch)
    values = report.reduce()
    expected = sum(values[term] for term in terms) * batch.num_teacher_rows
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    if not with_regular:
        assert not any(name.startswith("regular") for name in values)
    loss.backward()
    assert all(p.grad is None for p in objective.student.parameters())
    assert all(p.grad is not None for p in objective.recalibrator.parameters())


def test_probe_reports_norms_and_leaves_no_gradient(setting):
    objective, batch = setting.objective(), setting.batch()
    loss, report = run(setting, objective, batch, probe=True)
    assert all(p.grad is None for p in objective.parameters())
    norms = {name: float(square) ** 0.5 for name, square in report.norms.items()}
    assert norms.keys() == {
        "gradient/ar_boundary", "gradient/ar_other", "gradient/kl_boundary",
        "gradient/kl_other", "gradient/student_ce",
    }  # fmt: skip
    # All terms together, by one backward to the same hidden states.
    caught = {}
    body = objective.student.body

    def keep(*inputs):
        hidden = body(*inputs)
        hidden.register_hook(lambda gradient: caught.update(norm=gradient.norm().item()))
        return hidden

    objective.student.body = keep
    run(setting, objective, batch)[0].backward()
    parts = sum(norms.values())
    assert max(norms.values()) * 0.2 < caught["norm"] <= parts * (1 + 1e-5)


def test_first_token_weight_counts_boundary_rows_more(setting):
    batch = setting.batch()
    plain, report = Supervised(setting.parts("sft"))(batch, None, Totals(1, 1))
    more = Supervised(setting.parts("sft", LossConfig(first_token_ce=1.5)))
    weighted, _ = more(batch, None, Totals(1, 1))
    extra, count = report.means["student_ce_boundary"]
    assert count == batch.student.boundary_M.sum()
    assert weighted.item() == pytest.approx(plain.item() + 1.5 * float(extra), rel=1e-5)


def test_the_head_is_in_no_state_dict(setting):
    objective = setting.objective()
    assert not any("teacher" in name for name in objective.state_dict())
    assert not any("teacher" in name for name, _ in objective.named_parameters())


def test_the_python_example_of_the_docs_runs(setting, shards, capsys):
    text = (ROOT / "docs/python.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    folders = '"teacher", "student", "shards/train"'
    assert folders in example
    ours = (setting.teacher_folder, setting.student_folder, shards / "train")
    exec(example.replace(folders, ", ".join(repr(str(folder)) for folder in ours)), {})
    assert "student_ce_boundary" in capsys.readouterr().out


def test_without_the_boundary_row_the_teachers_terms_hold_the_others_alone(setting):
    batch = setting.batch()
    totals = {}
    for boundary in (True, False):
        losses = LossConfig(boundary=boundary, student_ce=0.0)
        loss, report = run(setting, setting.objective(losses), batch)
        totals[boundary] = {name: float(total) for name, (total, _) in report.means.items()}
        assert loss.item() == pytest.approx(totals[boundary]["ar"] + totals[boundary]["kl"])
    assert totals[False]["ar_boundary"] == 0 < totals[True]["ar_boundary"]
    assert totals[False]["kl_other"] == pytest.approx(totals[True]["kl_other"], rel=1e-5)


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_question_probes_leave_loss_and_gradient_alone(setting, kind):
    batch = setting.batch(with_regular=kind == "align")
    found = {}
    for probe in (False, True):
        objective = setting.objective(kind=kind)
        loss, report = run(setting, objective, batch, probe)
        loss.backward()
        gradients = [p.grad for p in objective.parameters() if p.grad is not None]
        found[probe] = (loss, gradients, report)
    assert torch.equal(found[True][0], found[False][0])
    assert all(map(torch.equal, found[True][1], found[False][1]))
    names = found[True][2].means.keys() - found[False][2].means.keys()
    for state in ("shuffled", "zeroed"):
        for rows in ("boundary", "other"):
            assert {f"probe/ar_{state}_{rows}", f"probe/kl_{state}_{rows}"} <= names


def test_labels_without_weight_have_no_gradient_to_probe(setting):
    objective = setting.objective(LossConfig(student_ce=0.0))
    _, report = run(setting, objective, setting.batch(), True)
    found = report.reduce()
    assert found["gradient/student_ce"] == 0 < found["gradient/kl_boundary"]
