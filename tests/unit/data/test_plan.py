"""Properties of the order: exactly once, pure, reproducible, independent of the world size."""

import hashlib
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.plan import PLAN_VERSION, StepPlan, deal, plan_epoch

pytestmark = pytest.mark.unit

classes_lists = st.lists(st.integers(0, 2), min_size=1, max_size=200).map(np.array)
batches = st.integers(1, 17)
seeds = st.integers(0, 2**64 - 1)
limits = settings(max_examples=60, deadline=None)


def as_index(classes: np.ndarray) -> ShardIndex:
    return cast(ShardIndex, SimpleNamespace(classes=classes))


@limits
@given(classes_lists, batches, seeds, st.integers(0, 9), st.booleans())
def test_every_sample_exactly_once(
    classes: np.ndarray, global_batch: int, seed: int, epoch: int, pure: bool
) -> None:
    arguments: dict[str, Any] = {"seed": seed, "epoch": epoch, "global_batch": global_batch}
    plan = plan_epoch(classes, **arguments, pure_classes=pure)
    assert plan.dtype == np.int64 and plan.shape[1] == global_batch
    assert sorted(plan[plan >= 0]) == list(range(len(classes)))
    np.testing.assert_array_equal(plan, plan_epoch(classes, **arguments, pure_classes=pure))


@limits
@given(classes_lists, batches, seeds, st.booleans())
def test_padding_only_in_one_tail_per_class(
    classes: np.ndarray, global_batch: int, seed: int, pure: bool
) -> None:
    plan = plan_epoch(classes, seed=seed, epoch=0, global_batch=global_batch, pure_classes=pure)
    num_padded: dict[int, int] = {}
    for slots in plan:
        num_real = int((slots >= 0).sum())
        assert num_real > 0 and (slots[num_real:] == -1).all()
        names = set(classes[slots[:num_real]].tolist())
        if pure:
            assert len(names) == 1
        if num_real < global_batch:
            name = names.pop() if pure else 0
            num_padded[name] = num_padded.get(name, 0) + 1
    assert all(count == 1 for count in num_padded.values())


def test_order_depends_on_seed_and_epoch_and_is_shuffled() -> None:
    classes = np.arange(600) % 3
    plans = [
        plan_epoch(classes, seed=seed, epoch=epoch, global_batch=8)
        for seed, epoch in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    assert len({plan.tobytes() for plan in plans}) == 4
    first_classes = classes[plans[0][:, 0]]
    assert len(set(first_classes[:20].tolist())) == 3, "batches of one class lie together"
    assert np.abs(np.diff(plans[0][0])).max() > 30, "samples are not shuffled"


def test_mixed_plan_mixes_classes() -> None:
    classes = np.arange(64) % 2
    plan = plan_epoch(classes, seed=0, epoch=0, global_batch=16, pure_classes=False)
    assert plan.shape == (4, 16)
    assert all(len(set(classes[slots].tolist())) == 2 for slots in plan)


def test_golden_plan() -> None:
    """A change here changes every running training's data: raise PLAN_VERSION with it."""
    plan = plan_epoch(np.arange(1000) % 3, seed=7, epoch=2, global_batch=16)
    digest = hashlib.sha256(plan.astype("<i8").tobytes()).hexdigest()
    assert (PLAN_VERSION, digest[:16]) == (1, "c27a93cf53469830")


@pytest.mark.parametrize("change", [{"seed": -1}, {"epoch": -1}, {"global_batch": 0}])
def test_bad_arguments(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        arguments: dict[str, Any] = {"seed": 0, "epoch": 0, "global_batch": 2, **change}
        plan_epoch(np.zeros(3, int), **arguments)
    with pytest.raises(ValueError, match="num_samples=0"):
        plan_epoch(np.zeros(0, int), seed=0, epoch=0, global_batch=2)


def test_step_plan_crosses_epochs_in_any_order() -> None:
    classes = np.arange(50) % 3
    plan = StepPlan(as_index(classes), seed=3, global_batch=8)
    assert plan.steps_per_epoch == 3 + 3 + 2  # of 17, 17 and 16 samples
    in_order = [plan.slots(step).copy() for step in range(24)]
    for epoch in range(3):
        whole = plan_epoch(classes, seed=3, epoch=epoch, global_batch=8)
        np.testing.assert_array_equal(np.stack(in_order[8 * epoch : 8 * epoch + 8]), whole)
    fresh = StepPlan(as_index(classes), seed=3, global_batch=8)
    for step in (23, 0, 12):
        np.testing.assert_array_equal(fresh.slots(step), in_order[step])
    with pytest.raises(ValueError, match="negative"):
        plan.slots(-1)
    with pytest.raises(ValueError, match="read-only"):
        plan.slots(0)[0] = 5


@limits
@given(seeds, st.sampled_from([1, 2, 3, 4, 6, 12, 24]), st.integers(0, 24))
def test_deal_keeps_the_step_whole(seed: int, num_micro_batches: int, num_padded: int) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.permutation(100)[:24].astype(np.int64)
    slots[24 - num_padded :] = -1
    costs = rng.integers(0, 5000, 100)
    dealt = deal(slots, costs, num_micro_batches, 24 // num_micro_batches)
    assert dealt.shape == (num_micro_batches, 24 // num_micro_batches)
    assert dealt.dtype == np.int64
    assert sorted(dealt.ravel()) == sorted(slots)  # whatever the world size: the same step
    np.testing.assert_array_equal(dealt, deal(slots, costs, num_micro_batches, len(dealt[0])))
    spread = (dealt == -1).sum(axis=1)
    assert spread.max() - spread.min() <= 1 + (len(dealt[0]) > 1)


def test_deal_is_a_snake() -> None:
    costs = np.array([1, 8, 3, 6, 5, 4, 7, 2])
    slots = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    dealt = deal(slots, costs, 4, 2)
    assert costs[dealt].tolist() == [[8, 1], [7, 2], [6, 3], [5, 4]]
    assert deal(np.array([-1, 2, -1, 1]), costs, 2, 2).tolist() == [[1, -1], [2, -1]]


def test_deal_balances() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(6, 0.5, 512).astype(np.int64)
    slots = rng.permutation(512).astype(np.int64)
    loads = costs[deal(slots, costs, 16, 32)].sum(axis=1)
    unsorted = costs[slots.reshape(16, 32)].sum(axis=1)
    assert loads.max() / loads.mean() < 1.05 < unsorted.max() / unsorted.mean()


def test_deal_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="cannot fill 2 micro-batches of 3"):
        deal(np.arange(5), np.ones(5, int), 2, 3)
