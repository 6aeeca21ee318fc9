"""byte_kd on one process: what its probe says, and a batch that shares nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genrecal_ds.data.batch import collate
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.models.token_bytes import token_bytes
from genrecal_ds.objectives.base import Totals
from genrecal_ds.objectives.byte_kd import build
from genrecal_ds.objectives.report import Report
from genrecal_ds.recipe.stage_config import LossConfig
from tests.unit.objectives.test_genrecal import Setting

pytestmark = pytest.mark.unit


class Bytes(Setting):
    def __init__(self, pair, shards):
        super().__init__(pair, shards)
        sides = self.encoders.teacher, self.encoders.student
        pieces = (token_bytes(side.tokenizer, side.folder) for side in sides)
        self.matcher = ByteMatcher(*pieces)
        parts = self.parts("byte_kd", LossConfig(student_ce=0.0), matcher=self.matcher)
        self.objective = build(parts)

    def matched(self):
        placeholder, rules = self.encoders.placeholder(), self.encoders.vision_rules
        return collate(self.pairs, placeholder, rules, False, self.matcher)


@pytest.fixture(scope="module")
def setting(pair, shards):
    return Bytes(pair, shards)


def test_the_probe_splits_the_gradient_and_leaves_none(setting):
    batch, objective = setting.matched(), setting.objective
    objective.zero_grad()
    rows = setting.rows(batch)
    _, report = objective(batch, rows, Totals(1.0, 1.0), True)
    assert all(parameter.grad is None for parameter in objective.parameters())
    found = report.reduce()
    with torch.no_grad():
        hidden = objective.student.body(*batch.student.inputs)
    leaf = hidden.flatten(0, 1)[batch.student.rows_M].requires_grad_()
    (whole,) = torch.autograd.grad(objective.kd(leaf, batch, rows)[0], leaf)
    parts = found["gradient/kd_boundary"] ** 2 + found["gradient/kd_other"] ** 2
    assert parts == pytest.approx(float(whole.square().sum()), rel=1e-4)
    assert found["gradient/kd_other"] > 0.2 * found["gradient/kd_boundary"] > 0
    assert found["kd_other"] > 0


def test_a_batch_that_shares_nothing_still_has_a_gradient(setting):
    batch, objective = setting.matched(), setting.objective
    nothing = type(batch.shared_bytes)(*(part[:0] for part in batch.shared_bytes))
    objective.zero_grad()
    loss, report = objective(
        batch._replace(shared_bytes=nothing), setting.rows(batch), Totals(1.0, 1.0)
    )
    loss.backward()
    assert float(loss.detach()) == 0 and "kd" not in report.reduce()
    assert all(p.grad is not None for p in objective.student.head.parameters())
    objective.zero_grad()


def test_labels_without_weight_are_measured_and_cost_no_gradient(setting):
    batch, objective = setting.matched(), setting.objective
    products = {}
    width, vocabulary = objective.student.head.in_features, objective.student.head.out_features
    one = 2 * len(batch.student.rows_M) * width * vocabulary
    for weight in (0.0, 1.0):
        objective.losses = LossConfig(student_ce=weight)
        objective.zero_grad()
        with torch.no_grad():
            hidden = objective.student.body(*batch.student.inputs)
        with FlopCounterMode(display=False) as counter:
            loss = objective.student_term(
                hidden, batch.student, Totals(1.0, 1.0), report := Report()
            )
            if weight:
                loss.backward()
        assert report.reduce()["student_ce_other"] > 0 and loss.requires_grad == bool(weight)
        products[weight] = counter.get_total_flops() / one
    objective.losses = LossConfig(student_ce=0.0)
    objective.zero_grad()
    assert products == {0.0: 1.0, 1.0: 2.0}  # rows need no gradient here, or one more


def test_chunks_of_rows_change_nothing(setting, monkeypatch):
    batch, objective = setting.matched(), setting.objective
    rows = setting.rows(batch)

    def loss_and_gradient():
        objective.zero_grad()
        loss, report = objective(batch, rows, Totals(1.0, 1.0))
        loss.backward()
        return loss.detach(), report.reduce(), objective.student.head.weight.grad.clone()

    whole = loss_and_gradient()
    monkeypatch.setattr("genrecal_ds.ops.linear_distance.CHUNK_BYTES", {"cpu": 0})
    assert len(batch.student.rows_M) > 32  # of 16 rows
    in_chunks = loss_and_gradient()
    torch.testing.assert_close(in_chunks[0], whole[0])
    assert in_chunks[1] == pytest.approx(whole[1], rel=1e-5)
    torch.testing.assert_close(in_chunks[2], whole[2], rtol=1e-4, atol=1e-5)
    objective.zero_grad()
