"""Answers decoded without a cache, by the body that trains, are those of transformers' generate."""

from dataclasses import replace

import pytest

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.generate import Generator
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import load_vlm
from genrecal_ds.training.decoding import decode, likeliest
from genrecal_ds.training.in_loop_scores import InLoopScores

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("model", ["student_init", "teacher_init"])
@pytest.mark.parametrize("num_pictures", [0, 1])
def test_the_same_answers_as_generate(pair, shards, model, num_pictures):
    folder = pair / model
    reader = ShardReader(ShardIndex.load(shards / "train"))
    samples = [s for s in map(reader.read, range(60)) if len(s.images) == num_pictures][:2]
    encoders = PairEncoders(ChatEncoder(folder, 1 << 20))
    found = decode(load_vlm(folder).eval(), encoders, samples, 6, likeliest)
    (expected,) = Generator(folder, 6).answers(samples, 8)
    assert len(samples) == 2 and found == expected
    # A rank that has nothing to answer decodes along, and has no texts.
    assert decode(load_vlm(folder).eval(), encoders, [], 1, likeliest) == []


def test_samples_that_cannot_be_scored_are_refused(pair, shards, monkeypatch):
    reader = ShardReader(ShardIndex.load(shards / "validation"))
    sample = replace(reader.read(0), answers=[])
    monkeypatch.setattr(reader, "read", lambda number: sample)
    scores = InLoopScores(PairEncoders(ChatEncoder(pair / "student_init", 64)), reader, 1, 1, 1)
    with pytest.raises(UserError, match="log.evaluate_every: sample .* has no answers"):
        scores.refuse()
