"""Decides which samples form which step: a pure function, independent of ranks and workers.

    permutation of the epoch -> windows of global batches -> each window sorted by length
    -> global batches that mix classes -> deal: micro-steps of one class and of like length

So a resume needs a dozen scalars (Order.facts and the number of the next step), and any world size
that divides the batch sees the same global batches. Slots are sample numbers. -1 is a slot of zero
weight. Such slots fill the epoch's last batch, the only incomplete one. So every sample comes
exactly once an epoch, and every rank gets the same number of steps.

Shapes: n samples, G global batch, U samples of one micro-step over all ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

PLAN_VERSION = 2  # raise it whenever the same arguments would give another order
PADDING = -1
NUM_CLASSES = 3  # text only, one image, several images: ShardIndex.classes


@dataclass(frozen=True, eq=False)
class Order:
    """Everything but the epoch that decides the order of a data set.

    classes: int8 [n]. lengths: int32 or int64 [n], tokens (data/lengths.py) or another measure of
    cost. lengths_digest identifies them. window: global batches sorted by length together; 1
    leaves the order random.
    """

    classes: np.ndarray
    lengths: np.ndarray
    lengths_digest: str
    seed: int
    global_batch: int
    window: int

    def __post_init__(self) -> None:
        is_sound = len(self.classes) == len(self.lengths) > 0 and self.seed >= 0
        if not (is_sound and self.global_batch > 0 and self.window > 0):
            raise ValueError(
                f"{len(self.classes)} classes, {len(self.lengths)} lengths, seed={self.seed}, "
                f"global_batch={self.global_batch}, window={self.window}: lengths and classes of "
                "one size > 0, batch and window > 0, seed >= 0"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal for a run to go on with the same samples."""
        return {
            "plan_version": PLAN_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": self.window,
            "lengths": self.lengths_digest,
        }


def plan_epoch(order: Order, epoch: int) -> np.ndarray:
    """int64 [num_steps, G]: the sample numbers of every step of one epoch.

    A window's samples are sorted by their length's quantile within their class, so that each
    global batch holds every class in the window's proportion and its lengths are alike within a
    class. The batches of all windows are shuffled. The last step holds what is left over, filled
    with -1.
    """
    num_samples, size = len(order.classes), order.global_batch
    shuffled = _permutation(num_samples, order.seed, epoch, stream=1)
    num_full = num_samples // size
    batches = np.full((-(-num_samples // size), size), PADDING, np.int64)
    for first in range(0, num_full, order.window):
        last = min(first + order.window, num_full)
        members = shuffled[first * size : last * size]
        if order.window > 1:
            members = members[np.argsort(_quantiles(order, members), kind="stable")]
        batches[first:last] = members.reshape(last - first, size)
    left_over = shuffled[num_full * size :]
    batches[num_full:, : len(left_over)] = left_over
    batches[:num_full] = batches[:num_full][_permutation(num_full, order.seed, epoch, stream=0)]
    return batches


def _quantiles(order: Order, members: np.ndarray) -> np.ndarray:
    """float64 in (0, 1): each member's place by length among the members of its class."""
    quantiles = np.empty(len(members))
    classes, lengths = order.classes[members], order.lengths[members]
    for name in range(NUM_CLASSES):
        chosen = np.flatnonzero(classes == name)
        by_length = chosen[np.argsort(lengths[chosen], kind="stable")]
        quantiles[by_length] = (np.arange(len(chosen)) + 0.5) / max(1, len(chosen))
    return quantiles


class StepPlan:
    """Gives the slots of any step, over epochs without end.

    Holds the plan of the epoch last asked for, 8 bytes a sample.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.global_batch = order.global_batch
        self._epoch = 0
        self._plan = self._make(0)
        self.steps_per_epoch = len(self._plan)

    def slots(self, step: int) -> np.ndarray:
        """int64 [G], read-only, of step >= 0 counted over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, row = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._make(epoch)
        return self._plan[row]

    def micro_batches(self, step: int, micro_batch: int, world_size: int) -> np.ndarray:
        """int64 [accumulation, world_size, micro_batch]: the step's slots, dealt; see deal."""
        slots = self.slots(step)
        return deal(slots, self.order.classes, self.order.lengths, micro_batch, world_size)

    def num_real(self, step: int) -> int:
        """The number of samples in the step; fewer than G only in an epoch's last step."""
        return int((self.slots(step) != PADDING).sum())

    def _make(self, epoch: int) -> np.ndarray:
        plan = plan_epoch(self.order, epoch)
        plan.flags.writeable = False  # a caller's in-place change would alter later steps
        return plan


class GivenSamples:
    """A plan for validation and for caches: these samples, in order, whatever the batch size."""

    def __init__(self, samples: np.ndarray, global_batch: int) -> None:
        self.samples = samples
        self.global_batch = global_batch
        self.steps_per_epoch = -(-len(samples) // global_batch)

    def micro_batches(self, step: int, micro_batch: int, world_size: int) -> np.ndarray:
        """int64 [accumulation, world_size, micro_batch]; -1 behind the last sample."""
        slots = np.full(self.global_batch, PADDING, np.int64)
        own = self.samples[step * self.global_batch : (step + 1) * self.global_batch]
        slots[: len(own)] = own
        return slots.reshape(-1, world_size, micro_batch)


def deal(
    slots: np.ndarray,
    classes: np.ndarray,
    lengths: np.ndarray,
    micro_batch: int,
    world_size: int,
) -> np.ndarray:
    """Deal one step's slots [G] to micro-steps and ranks.

    Returns int64 [accumulation, world_size, micro_batch] with the same slots. Each class fills as
    many micro-steps of its own as it can; what is left over of all classes, and the -1 slots,
    fill the last ones: fewer of those than there are classes in the step, -1 not counted. Within a
    micro-step slots are sorted by length, so that a micro-batch pads little and the ranks, which
    wait for each other in every layer, have about the same to do. Raises ValueError when G is not
    a multiple of U.
    """
    unit = micro_batch * world_size
    if slots.ndim != 1 or len(slots) % unit:
        raise ValueError(
            f"{slots.shape} slots cannot fill micro-steps of {world_size} x {micro_batch}"
        )
    real = slots[slots != PADDING]
    pure, rest = [], []
    for name in range(NUM_CLASSES):
        members = real[classes[real] == name]
        members = members[
            np.argsort(-lengths[members], kind="stable")
        ]  # ties keep the plan's order
        num_own = len(members) // unit * unit
        pure.append(members[:num_own])
        rest.append(members[num_own:])
    mixed = np.concatenate([*rest, slots[slots == PADDING]])
    steps = np.concatenate([*pure, mixed]).reshape(-1, unit)
    first_mixed = (len(slots) - len(mixed)) // unit
    costs = np.where(steps == PADDING, -1, lengths[np.maximum(steps, 0)])
    order = np.argsort(-costs[first_mixed:], axis=1, kind="stable")
    steps[first_mixed:] = np.take_along_axis(steps[first_mixed:], order, axis=1)
    dealt = steps.reshape(-1, world_size, micro_batch)
    # Every second micro-step runs through the ranks the other way round, or rank 0 would have the
    # longest of each.
    dealt[1::2] = dealt[1::2, ::-1].copy()
    return np.ascontiguousarray(dealt)


def _permutation(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Permutation [count] from Philox words.

    Generator.shuffle may change between NumPy releases, raw bit-generator words may not
    (NEP 19); a plan must mean the same after an upgrade in the middle of a run.
    """
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, 0, stream, PLAN_VERSION], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(words, kind="stable")
