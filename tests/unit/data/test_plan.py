"""Properties of the order: exactly once, pure, reproducible, independent of the world size."""

import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal_ds.data.plan import (
    NUM_CLASSES,
    PADDING,
    PLAN_VERSION,
    GivenSamples,
    Order,
    StepPlan,
    deal,
    plan_epoch,
)

pytestmark = pytest.mark.unit

WORLDS = (1, 2, 3, 4, 8, 64)
limits = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**64 - 1)


@st.composite
def orders(draw: Any) -> Order:
    """A data set of 1 to 1500 samples with any mix of classes, and any batch size."""
    size = draw(st.integers(1, 1500))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shares = rng.dirichlet(draw(st.sampled_from([(1, 1, 1), (0.1, 0.1, 0.1), (5, 1, 0.1)])))
    classes = rng.choice(NUM_CLASSES, size, p=shares).astype(np.int8)
    lengths = rng.lognormal(6, 1, size).astype(np.int64) + 1000 * classes.astype(np.int64)
    return Order(
        classes,
        lengths,
        "random",
        seed=draw(seeds),
        global_batch=draw(st.sampled_from([1, 7, 24, 192, 384])),
        window=draw(st.sampled_from([1, 2, 50])),
    )


def order_of(num_samples: int, global_batch: int, **changes: Any) -> Order:
    classes = (np.arange(num_samples) % 3).astype(np.int8)
    lengths = (np.arange(num_samples) * 7919) % 1009
    arguments = {"seed": 7, "window": 4, **changes}
    return Order(classes, lengths, "made up", global_batch=global_batch, **arguments)


@limits
@given(orders(), st.integers(0, 9))
def test_every_plan_is_a_permutation_with_one_incomplete_batch(order: Order, epoch: int) -> None:
    plan = plan_epoch(order, epoch)
    num_samples, size = len(order.classes), order.global_batch
    assert plan.dtype == np.int64 and plan.shape == (-(-num_samples // size), size)
    assert sorted(plan[plan != PADDING]) == list(range(num_samples))
    assert (plan[:-1] != PADDING).all(), "only the last batch may be incomplete"
    num_real = int((plan[-1] != PADDING).sum())
    assert num_real > 0 and (plan[-1, num_real:] == PADDING).all()
    np.testing.assert_array_equal(plan, plan_epoch(order, epoch))


@limits
@given(orders(), st.integers(1, 4))
def test_layouts_share_batches_and_micro_steps_are_pure(order: Order, micro_batch: int) -> None:
    plan = StepPlan(order)
    for world_size in WORLDS:
        unit = world_size * micro_batch
        if order.global_batch % unit:
            continue
        for step in {0, plan.steps_per_epoch // 2, plan.steps_per_epoch - 1}:
            slots = plan.slots(step)
            dealt = plan.micro_batches(step, micro_batch, world_size)
            # every rank gets equally many micro-batches, whatever the batch holds
            assert dealt.shape == (len(slots) // unit, world_size, micro_batch)
            assert sorted(dealt.ravel()) == sorted(slots), "the same global batch everywhere"
            classes = [set(order.classes[row[row != PADDING]]) for row in dealt]
            num_classes = len(set(order.classes[slots[slots != PADDING]]))
            assert sum(len(names) > 1 for names in classes) <= num_classes
            for name in range(NUM_CLASSES):
                count = int((order.classes[slots[slots != PADDING]] == name).sum())
                num_pure = sum(
                    names == {name} and (row != PADDING).all()
                    for names, row in zip(classes, dealt, strict=True)
                )
                assert num_pure >= count // unit, "pure where the counts divide"


@pytest.mark.parametrize("world_size", WORLDS)
def test_equal_step_counts_for_every_world_size(world_size: int) -> None:
    plan = StepPlan(order_of(1000, 192))
    counts = []
    for rank in range(world_size):
        dealt = [plan.micro_batches(step, 1, world_size)[:, rank] for step in range(6)]
        counts.append(sum(len(rows) for rows in dealt))
    assert plan.steps_per_epoch == 6 and set(counts) == {6 * 192 // world_size}


@limits
@given(orders())
def test_batches_mix_classes_in_the_windows_proportion(order: Order) -> None:
    plan = plan_epoch(order, 0)
    num_full = len(order.classes) // order.global_batch
    if order.window == 1 or num_full <= 1 or num_full > order.window:
        return  # of several windows the batches are shuffled together
    full = plan[:num_full]
    for name in range(NUM_CLASSES):
        counts = (order.classes[full] == name).sum(axis=1)
        assert counts.max() - counts.min() <= NUM_CLASSES


def test_windows_gather_like_lengths() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 6400).astype(np.int8)
    lengths = rng.lognormal(6, 1, 6400).astype(np.int64)
    spreads = []
    for window in (1, 50):
        order = Order(classes, lengths, "", seed=0, global_batch=64, window=window)
        plan = plan_epoch(order, 0)
        spreads.append(np.mean([np.log(lengths[row]).std() for row in plan]))
    assert spreads[1] < 0.2 * spreads[0]


def test_order_depends_on_seed_epoch_and_window_and_is_shuffled() -> None:
    plans = [
        plan_epoch(order_of(600, 8, seed=seed, window=window), epoch)
        for seed, epoch, window in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 50))
    ]
    assert len({plan.tobytes() for plan in plans}) == 5
    assert np.abs(np.diff(plans[0][0])).max() > 30, "samples are not shuffled"
    lengths = order_of(600, 8).lengths
    means = lengths[plans[4]].mean(axis=1)
    assert (np.diff(means) > 0).any() and (np.diff(means) < 0).any(), "batches lie by length"


def test_golden_plan() -> None:
    """A change here changes every running training's data: raise PLAN_VERSION with it."""
    plan = plan_epoch(order_of(1000, 16, window=8), epoch=2)
    dealt = StepPlan(order_of(1000, 16, window=8)).micro_batches(100, 2, 4)
    digest = hashlib.sha256(plan.astype("<i8").tobytes() + dealt.astype("<i8").tobytes())
    assert (PLAN_VERSION, digest.hexdigest()[:16]) == (2, "2a73254b2db7e61e")


def test_facts_name_everything_that_decides_the_order() -> None:
    base = order_of(100, 8).facts
    assert base.keys() == {"plan_version", "seed", "global_batch", "window", "lengths"}
    for change in ({"seed": 8}, {"window": 5}):
        assert order_of(100, 8, **change).facts != base
    assert order_of(100, 4).facts != base


@pytest.mark.parametrize("change", [{"seed": -1}, {"window": 0}])
def test_bad_arguments(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch and window > 0, seed >= 0"):
        order_of(10, 2, **change)
    with pytest.raises(ValueError, match="global_batch=0"):
        order_of(10, 0)
    with pytest.raises(ValueError, match="0 classes, 0 lengths"):
        order_of(0, 2)


def test_step_plan_crosses_epochs_in_any_order() -> None:
    order = order_of(50, 8)
    plan = StepPlan(order)
    assert plan.steps_per_epoch == 7
    in_order = [plan.slots(step).copy() for step in range(21)]
    for epoch in range(3):
        whole = plan_epoch(order, epoch)
        np.testing.assert_array_equal(np.stack(in_order[7 * epoch : 7 * epoch + 7]), whole)
    fresh = StepPlan(order)
    for step in (20, 0, 12):
        np.testing.assert_array_equal(fresh.slots(step), in_order[step])
    assert [plan.num_real(step) for step in range(7)] == [8] * 6 + [2]
    with pytest.raises(ValueError, match="negative"):
        plan.slots(-1)
    with pytest.raises(ValueError, match="read-only"):
        plan.slots(0)[0] = 5


def test_deal_by_hand() -> None:
    """Micro-steps of 2 ranks x 2: one of class 1, then the rest; longest first, ranks alternate."""
    classes = np.array([0, 1, 1, 1, 1, 1, 2, 0], np.int8)
    lengths = np.array([10, 50, 80, 60, 70, 40, 90, 20])
    dealt = deal(np.arange(8), classes, lengths, micro_batch=2, world_size=2)
    assert dealt.tolist() == [[[2, 4], [3, 1]], [[7, 0], [6, 5]]]
    dealt = deal(np.array([1, -1, 0, -1]), classes, lengths, micro_batch=2, world_size=2)
    assert dealt.tolist() == [[[1, 0], [-1, -1]]]


def test_deal_pads_little_and_keeps_ranks_together() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6, 0.5, 512).astype(np.int64)
    classes = rng.integers(0, 3, 512).astype(np.int8)
    slots = rng.permutation(512).astype(np.int64)

    def padding_and_waiting(table: np.ndarray) -> tuple[float, float]:
        """Padded per real token; and tokens on the critical path: ranks wait in every layer."""
        tokens = lengths[table]
        padded = tokens.max(axis=2) * table.shape[2]
        return padded.sum() / tokens.sum(), padded.max(axis=1).sum() / tokens.sum() * 8

    dealt = padding_and_waiting(deal(slots, classes, lengths, 4, 8))
    unsorted = padding_and_waiting(slots.reshape(-1, 8, 4))
    assert dealt[0] < 1.05 < 1.3 < unsorted[0], (dealt, unsorted)
    assert dealt[1] < 1.45 < 2 < unsorted[1], (dealt, unsorted)


def test_deal_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="cannot fill micro-steps of 2 x 3"):
        deal(np.arange(5), np.zeros(5, np.int8), np.ones(5, int), 3, 2)


def test_first_samples() -> None:
    plan = GivenSamples(np.arange(5), 4)
    assert plan.steps_per_epoch == 2
    assert plan.micro_batches(0, 2, 2).tolist() == [[[0, 1], [2, 3]]]
    assert plan.micro_batches(1, 2, 2).tolist() == [[[4, -1], [-1, -1]]]


MILLION = """
import resource, sys, time
import numpy as np
from genrecal_ds.data.plan import Order, StepPlan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
classes = rng.integers(0, 3, 1_000_000).astype(np.int8)
lengths = rng.integers(10, 4000, 1_000_000)
start = time.perf_counter()
plan = StepPlan(Order(classes, lengths, "", seed=0, global_batch=256, window=50))
plan.slots(plan.steps_per_epoch)  # the second epoch
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_two_epochs_of_a_million_samples_are_planned_in_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True)
    seconds, kib = map(float, done.stdout.split())
    assert seconds < 20 and kib < 2**20, (seconds, kib)  # 10 s an epoch, 1 GiB
