"""Which conversations get an answer of the student's, and what becomes of it."""

import pytest
import torch

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairDataset, PairEncoders
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.recipe.stage_config import OnPolicyConfig
from genrecal_ds.training import on_policy
from genrecal_ds.training.decoding import drawn
from genrecal_ds.training.on_policy import OnPolicy

pytestmark = pytest.mark.unit
SLOTS = tuple(range(12))


@pytest.fixture(scope="module")
def dataset(pair, shards):
    encoders = PairEncoders(
        ChatEncoder(pair / "student_init", 128), ChatEncoder(pair / "teacher_init", 128)
    )
    return PairDataset(ShardIndex.load(shards / "train"), encoders, with_regular=False)


def answered(dataset, monkeypatch, texts, share, step=3):
    """(batch, number of samples that were asked)."""
    asked = []

    def decode(student, encoders, samples, max_new_tokens, choose):
        asked.append(len(samples))
        return texts[: len(samples)]

    monkeypatch.setattr(on_policy, "decode", decode)
    sampler = OnPolicy(dataset, OnPolicyConfig(share=share, max_new_tokens=6), seed=5)
    (batch,) = sampler(None, step, [dataset[SLOTS]])
    return batch, asked[0]


def texts_of(dataset, batch):
    """Answers as the student is taught them."""
    tokenizer = dataset.encoders.student.tokenizer
    spans = batch.student.boundary_M.nonzero().flatten().tolist()
    ends = [*spans[1:], len(batch.student.labels_M)]
    labels = [batch.student.labels_M[a:b] for a, b in zip(spans, ends, strict=True)]
    return [tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in labels]


def test_all_last_answers_are_the_students_on_both_sides(dataset, monkeypatch):
    texts = [f" {number} plus 1" for number in range(12)]
    given = dataset[SLOTS]
    batch, asked = answered(dataset, monkeypatch, texts, share=1.0)
    assert asked == 12 and batch.used_ids == given.used_ids and batch.turns_of == given.turns_of
    last, taught = -1, texts_of(dataset, batch)
    for turns, text in zip(batch.turns_of, texts, strict=True):
        last += turns
        assert taught[last] == text.strip()
    theirs = dataset.encoders.teacher.tokenizer.decode(batch.teacher.labels_N)
    assert all(text.strip() in theirs for text in texts)


def test_an_answer_that_cannot_be_used_leaves_the_given_one(dataset, monkeypatch):
    end = dataset.encoders.student.tokenizer.convert_ids_to_tokens(
        dataset.encoders.student.end_of_turn
    )
    batch, _ = answered(dataset, monkeypatch, [f"7 {end} 8"] * 12, share=1.0)
    assert torch.equal(batch.student.labels_M, dataset[SLOTS].student.labels_M)


def test_who_is_asked_depends_on_step_and_sample_alone(dataset, monkeypatch):
    def changed(step):
        batch, asked = answered(dataset, monkeypatch, ["of it"] * 12, 0.5, step)
        return asked, texts_of(dataset, batch)

    assert changed(3) == changed(3) != changed(4)
    assert 0 < changed(3)[0] < 12
    batch, asked = answered(dataset, monkeypatch, [], 1e-9)
    assert asked == 0 and torch.equal(batch.student.labels_M, dataset[SLOTS].student.labels_M)


class Words:
    """An encoder of four tokens, the third of which is special."""

    special_ids, stops, tokenizer = torch.tensor([2, 3]), {3}, range(4)


def test_special_tokens_and_columns_of_nobody_are_not_drawn():
    choose = drawn(1.0, [torch.Generator().manual_seed(0)], Words())
    logits = torch.tensor([[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]])  # two columns that are padding
    assert {choose(logits)[0] for _ in range(60)} == {0, 1, 3}  # 3 ends the answer
    assert {choose(logits[:, :2])[0] for _ in range(60)} == {0, 1}  # a head of fewer columns


def test_draws_follow_the_distribution_and_their_generator():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    generators = [torch.Generator().manual_seed(7)]
    choose = drawn(2.0, generators, Words())
    counts = torch.bincount(
        torch.tensor([choose(logits[None])[0] for _ in range(4000)]), minlength=4
    )
    torch.testing.assert_close(counts / 4000, (logits / 2).softmax(-1), rtol=0, atol=0.03)
    again = [
        drawn(1.0, [torch.Generator().manual_seed(n)], Words())(logits.expand(2, -1))
        for n in (1, 1)
    ]
    assert again[0] == again[1] and again[0][1] == 0  # the second row has no sample


def test_a_conversation_without_room_for_an_answer_keeps_its_own(dataset, monkeypatch):
    monkeypatch.setattr(on_policy, "decode", lambda student, encoders, samples, *_: samples or [])
    (batch,) = OnPolicy(dataset, OnPolicyConfig(share=1.0, max_new_tokens=127), seed=5)(
        None, 0, [dataset[SLOTS]]
    )
    assert torch.equal(batch.student.labels_M, dataset[SLOTS].student.labels_M)
