"""A loss that leaves its usual range is noted, with the samples it came from."""

import json
import random

import pytest

from genrecal_ds.data.batch import PairBatch
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.recipe.config import FaultConfig
from genrecal_ds.training.guards.faults import MIN_HISTORY, Faults

pytestmark = pytest.mark.unit


def batch(*samples: int) -> PairBatch:
    return PairBatch(None, None, 2, 0, 0, sample_ids=samples)


def test_spikes(tmp_path, shards):
    reader = ShardReader(ShardIndex.load(shards / "train"))
    faults = Faults(tmp_path / "faults", FaultConfig(), reader)
    chance = random.Random(0)
    for step in range(200):
        value = 2.0 + 0.1 * chance.gauss(0, 1)
        is_spike = step in (5, 100, 150)  # the first comes before anything is usual
        values = {"loss": 4.0 if is_spike else value, "gradient_norm": 1.0}
        found = faults.check_spikes(step, [batch(7, 3)], values)
        assert found == (["loss"] if is_spike and step > MIN_HISTORY else [])
    lines = [
        json.loads(line) for line in (tmp_path / "faults/rank0.jsonl").read_text().splitlines()
    ]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("spike of loss", 101), ("spike of loss", 151),
    ]  # fmt: skip
    assert lines[0]["samples"] == [7, 3] and len(set(lines[0]["keys"])) == 2
    assert not Faults(tmp_path, FaultConfig(spike_sigmas=0), reader).check_spikes(
        0, [batch(1)], {"loss": 1e9}
    )
