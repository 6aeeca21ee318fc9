"""What flops.py says of the heads, against torch's own count of each kind of stage's forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genrecal_ds.data.batch import collate
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.estimate import flops
from genrecal_ds.estimate.sizes import load_of
from genrecal_ds.models.head import FrozenHead
from genrecal_ds.models.vlm import TeacherBody, load_vlm
from genrecal_ds.objectives.base import TeacherRows, Totals
from genrecal_ds.objectives.report import Clock
from genrecal_ds.ops.head_loss import chunked
from genrecal_ds.ops.head_loss.epilogue import softmax_epilogue_
from genrecal_ds.recipe.recipe_file import load_recipe
from genrecal_ds.training.inputs import open_inputs
from genrecal_ds.training.objective import build_objective, byte_matcher
from tests.fixtures import recipe_tree, write_recipe

pytestmark = pytest.mark.unit

STAGES = {
    "pretrain": {"kind": "pretrain"},
    "sft": {"kind": "sft"},
    "sft without its head": {"kind": "sft", "train": ["layers", "norm"]},
    "align": {"kind": "align"},
    "align without a regular pass": {"kind": "align", "losses": {"regularizer": "none"}},
    "align by mse": {"kind": "align", "losses": {"regularizer": "mse"}},
    "distill": {"kind": "distill"},
    "distill without labels": {"kind": "distill", "losses": {"student_ce": 0}},
    "uld": {"kind": "uld"},
    "uld without labels": {"kind": "uld", "losses": {"student_ce": 0}},
    "uld without its head": {"kind": "uld", "train": ["layers", "norm"]},
    "logit_kd": {"kind": "logit_kd"},
    "mot": {"kind": "mot"},
    "byte_kd": {"kind": "byte_kd", "losses": {"student_ce": 0}},
    "dskd": {"kind": "dskd"},
}


class CountingClock(Clock):
    """FLOPs in place of seconds, of what runs in `head`."""

    def __init__(self):
        super().__init__()
        self.head = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        self.head += counter.get_total_flops() * (name == "head")


class SeenHead(NamedTuple):
    """A frozen head whose products a counter sees: none sees inside a registered op."""

    of: FrozenHead

    def loss(self, rows, targets, labels, ce_weights, kl_weights):
        arguments = (rows, targets, labels, self.of.head, ce_weights, kl_weights)
        with torch.no_grad():
            chunked.head_loss_forward(*arguments, softmax_epilogue_, rows.requires_grad)
        return self.of.loss(*arguments[:3], ce_weights, kl_weights)


@pytest.mark.parametrize("name", STAGES)
def test_products_with_the_heads(name, tmp_path, pair, shards):
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"steps": 1, **STAGES[name]}])
    if STAGES[name]["kind"] == "logit_kd":  # of one tokenizer
        tree["teacher"] = {"path": str(pair / "student_untied"), "max_length": 128}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", **tree))
    (stage,) = recipe.stages
    encoders = open_inputs(recipe).encoders[stage.facts.has_teacher]
    matcher = byte_matcher(stage, encoders)
    student = load_vlm(recipe.student.path)
    student.train_only(stage.trained_components)
    clock = CountingClock()
    objective = build_objective(recipe, stage, student, None, encoders, clock, matcher)
    if stage.facts.has_recalibrator or stage.facts.projects:
        objective.teacher_head = SeenHead(objective.teacher_head)
    reader = ShardReader(ShardIndex.load(shards / "train"))
    samples = [reader.read(i) for i in range(8)]
    pairs = [pair for s in samples for pair in encoders.encode(s.messages, s.images)]
    rules = encoders.vision_rules
    batch = collate(pairs, encoders.placeholder(), rules, stage.has_regular, matcher)
    rows, student_rows = None, len(batch.student.rows_M)
    if stage.facts.has_teacher:
        with torch.no_grad():
            teacher = TeacherBody(load_vlm(recipe.teacher.path))
            read = (batch.teacher.inputs, batch.teacher.rows_A, batch.teacher.targets_N)
            rows = TeacherRows(*teacher(*read))
    objective(batch, rows, Totals(1.0, 1.0))

    load = load_of(recipe, stage, gpus=1, per_host=1)
    expected = flops.student_products(load) * flops.head_product(load.student, student_rows)
    if stage.facts.has_teacher:
        # GenRecal and MoT read the teacher's rows as they are, others the one beside
        # each of ours.
        read_rows = student_rows
        if stage.facts.has_recalibrator or stage.facts.takes_whole_conversations:
            read_rows = len(batch.teacher.labels_N)
        elif stage.facts.matches_bytes:  # rows of the boundaries that are shared
            read_rows = len(batch.shared_bytes.teacher_I.unique())
        expected += flops.teacher_products(load) * flops.head_product(load.teacher, read_rows)
    if stage.facts.projects:
        expected += 2 * load.recalibrator * student_rows
    assert clock.head == expected
