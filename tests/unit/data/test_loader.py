"""Micro-batches: the same for any number of workers and any start; ranks share a step exactly."""

import re

import numpy as np
import pytest
import torch

from data_tools.builder import build
from data_tools.sources import digits
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairDataset, PairEncoders, micro_batches
from genrecal_ds.data.pair import EncodedChat, Unusable
from genrecal_ds.data.plan import GivenSamples, Order, StepPlan
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit


class Letters:
    """An encoder whose tokens are the characters of question and answer; 0 ends a turn."""

    max_length = 1000
    reads_images = True
    vision_rules = {"pixels": "rows"}
    digest = "letters"

    def rewrites(self, messages: list) -> bool:
        return False

    def encode(self, messages, images, last_turn=False):
        ids, answers = [], []
        for message in messages:
            text = message["content"][-1]["text"]
            if "sum of the left" in text:
                raise Unusable("a left column")
            start = len(ids)
            ids += [ord(letter) for letter in text]
            if message["role"] == "assistant":
                ids.append(0)
                answers.append((start, len(ids)))
        vision = {"pixels": torch.ones(len(images), 1)} if images else {}
        return EncodedChat(torch.tensor(ids), tuple(answers), {}, vision)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "train"
    build(digits.Digits("train", 43, 0), folder, arguments={})
    return PairDataset(ShardIndex.load(folder), PairEncoders(Letters(), Letters()), True)


def step_plan(dataset, global_batch=8):
    index = dataset.reader.index
    return StepPlan(Order(index.classes, index.costs(), "estimated", 1, global_batch, window=2))


def steps(dataset, first=0, last=5, rank=0, world_size=1, num_workers=0):
    plan = step_plan(dataset)
    return list(
        micro_batches(
            dataset,
            plan,
            first_step=first,
            last_step=last,
            rank=rank,
            world_size=world_size,
            micro_batch=2,
            num_workers=num_workers,
        )  # fmt: skip
    )


def tokens(step):
    return [batch.student.inputs.input_ids for batch in step]


def test_workers_and_start_do_not_change_a_batch(dataset):
    alone, workers, late = (
        steps(dataset), steps(dataset, num_workers=2), steps(dataset, first=3)
    )  # fmt: skip
    assert len(alone) == 5 and all(len(step) == 4 for step in alone)
    for first, second in [*zip(alone, workers, strict=True), *zip(alone[3:], late, strict=True)]:
        assert all(torch.equal(a, b) for a, b in zip(tokens(first), tokens(second), strict=True))


def conversations(batches):
    """Texts of the real conversations, told apart from placeholders by their labels."""
    found = []
    for batch in batches:
        inputs = batch.student.inputs
        lengths = inputs.attention_mask.sum(1).tolist()
        rows = zip(inputs.input_ids.tolist(), lengths, strict=True)
        found += [tuple(ids[:length]) for ids, length in rows]
    return found


def test_ranks_share_a_step_whatever_the_world_size(dataset):
    for step, alone in enumerate(steps(dataset)):
        expected = sorted(conversations(alone))
        for world_size in (2, 4):
            ranks = [
                steps(dataset, step, step + 1, rank, world_size)[0] for rank in range(world_size)
            ]
            assert sorted(conversations(b for rank in ranks for b in rank)) == expected
            assert sum(b.num_samples for rank in ranks for b in rank) == sum(
                b.num_samples for b in alone
            )


def test_validation_reads_the_first_samples_whatever_the_batch(dataset):
    found = []
    for global_batch in (2, 8):
        plan = GivenSamples(np.arange(13), global_batch)
        assert plan.steps_per_epoch == -(-13 // global_batch)
        steps = micro_batches(
            dataset, plan, first_step=0, last_step=plan.steps_per_epoch, rank=0, world_size=1,
            micro_batch=2,
        )  # fmt: skip
        batches = [batch for step in steps for batch in step]
        found.append(sum(batch.num_student_rows for batch in batches))
        assert sum(batch.num_samples + len(batch.unusable) for batch in batches) == 13
    assert found[0] == found[1] > 0


def test_unusable_samples_are_counted_with_their_reason(dataset):
    batches = [batch for step in steps(dataset, last=20) for batch in step]
    reasons = [reason for batch in batches for reason in batch.unusable]
    assert set(reasons) == {"a left column"}
    keys = [key for batch in batches for key in batch.unusable_keys]
    assert len(keys) == len(reasons) and all("/0" in key for key in keys)
    assert all(batch.student.inputs.input_ids.shape[0] >= 1 for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_long_as_an_error_is_one_line(dataset, num_workers):
    class Short(Letters):
        max_length = 30

    encoders = PairEncoders(Short(), Short(), too_long="error")
    strict = PairDataset(dataset.reader.index, encoders, True)
    said = ""
    try:
        steps(strict, num_workers=num_workers)
    except UserError as error:  # pytest.raises would keep it, and with it the loader's workers
        said = str(error)
    assert re.fullmatch(
        r"sample \d+, key digits-train/\d{9}: longer than max_length: teacher \d+ of 30, student "
        r"\d+ of 30 tokens; raise max_length, or set data.too_long to drop or truncate_question",
        said,
    )


def test_truncated_samples_are_counted(dataset):
    class Short(Letters):
        max_length = 45

    for policy in ("drop", "truncate_question"):
        encoders = PairEncoders(Short(), Short(), too_long=policy)
        batches = [b for step in steps(PairDataset(dataset.reader.index, encoders, True), last=6)
                   for b in step]  # fmt: skip
        assert sum(batch.num_truncated for batch in batches) > 0
        lengths = [int(n) for b in batches for n in b.student.inputs.attention_mask.sum(1)]
        assert max(lengths) <= 45


def test_a_damaged_sample_becomes_a_counted_reject(dataset, tmp_path):
    build(digits.Digits("train", 20, 0), tmp_path / "d", arguments={})
    index = ShardIndex.load(tmp_path / "d")
    shard = tmp_path / "d" / index.shards[0].name
    data = bytearray(shard.read_bytes())
    data[int(index.records[3]["offset"]) + 600] ^= 1
    shard.write_bytes(bytes(data))
    damaged = PairDataset(index, PairEncoders(Letters()), False)
    batch = damaged[(3, 4)]
    assert len(batch.unreadable) == 1 and "crc32" in batch.unreadable[0]
    assert batch.num_samples <= 1
