"""A rank gets back what a worker packed; a step of many micro-batches holds few descriptors."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from genrecal_ds.data.handover import packed, unpacked
from tests.fixtures import ROOT, environment

pytestmark = pytest.mark.unit


class Sample(NamedTuple):
    named: dict[str, torch.Tensor]
    several: tuple[Any, ...]
    nothing: None = None


def test_everything_comes_back_as_it_was():
    whole = torch.arange(24.0).view(4, 6)
    sample = Sample(
        {"rows": whole, "columns": whole.T, "low": whole.bfloat16(), "none": torch.empty(0, 3)},
        (torch.tensor([True, False, True]), torch.tensor(-5), 7, "text", (1, 2), whole[1:3, ::2]),
    )
    found = unpacked(packed(sample))
    assert isinstance(found, Sample) and found.nothing is None and found.several[2:5] == (
        7, "text", (1, 2),
    )  # fmt: skip
    tensors = [*sample.named.values(), *sample.several[:2], sample.several[5]]
    for tensor, again in zip(
        tensors, [*found.named.values(), *found.several[:2], found.several[5]], strict=True
    ):
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)
        assert again.data_ptr() % 64 == 0 or not again.numel()
    found.named["rows"].zero_()
    assert whole.sum() == 276  # what came is a copy


def test_what_holds_no_tensor():
    assert unpacked(packed((1, "text"))) == (1, "text")


def read_in_one_step(folder: Path, limit: int) -> None:
    """In a process of its own: 128 micro-batches of one step held at once under the limit."""
    from genrecal_ds.data.index import ShardIndex
    from genrecal_ds.data.loader import PairDataset, PairEncoders, micro_batches
    from genrecal_ds.data.plan import GivenSamples
    from tests.unit.data.test_loader import Letters

    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    index = ShardIndex.load(folder)
    dataset = PairDataset(index, PairEncoders(Letters(), Letters()), True)
    plan = GivenSamples(range(len(index)), 128)
    (step,) = micro_batches(
        dataset, plan, first_step=0, last_step=1, rank=0, world_size=1, micro_batch=1,
        num_workers=2,
    )  # fmt: skip
    samples = sum(batch.num_samples + len(batch.unusable) for batch in step)
    print(len(step), samples, len(os.listdir("/proc/self/fd")))


@pytest.mark.parametrize("limit", [128, 1024])
def test_a_step_of_many_micro_batches_needs_few_descriptors(shards_of_digits, limit):
    """The soft limit and the hard one: `ulimit -n` sets both, so no process may raise its own."""
    program = (
        "from pathlib import Path\n"
        "from tests.unit.data.test_handover import read_in_one_step\n"
        f"read_in_one_step(Path({str(shards_of_digits)!r}), {limit})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    micro, samples, descriptors = map(int, done.stdout.split())
    assert (micro, samples) == (128, 128) and descriptors < 64


@pytest.fixture(scope="module")
def shards_of_digits(tmp_path_factory) -> Path:
    from tests.fixtures import build_digit_shards

    return build_digit_shards(tmp_path_factory.mktemp("digits") / "train", "train", 128)
