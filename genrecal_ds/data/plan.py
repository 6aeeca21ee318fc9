"""Which samples form which step: a pure function, independent of ranks, workers and micro-batch.

Resuming therefore needs a dozen scalars (fingerprint, PLAN_VERSION, seed, global_batch, step) and
any world size that divides the batch sees the same steps. Slots are sample numbers; -1 is a
placeholder of zero weight that completes the last batch of a class, so every real sample comes
exactly once an epoch and every rank gets equally many steps.
"""

import numpy as np

from genrecal_ds.data.index import ShardIndex

PLAN_VERSION = 1  # raise it whenever the same arguments would give another order
PADDING = -1


def plan_epoch(
    index_classes: np.ndarray,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    pure_classes: bool = True,
) -> np.ndarray:
    """The sample numbers of every step of one epoch.

    index_classes: [num_samples], integers >= 0 (ShardIndex.classes). Returns int64
    [num_steps, global_batch]. Each class is shuffled and cut into batches, the last one of each
    class ends in -1 slots, and the batches of all classes are shuffled. pure_classes=False
    treats all samples as one class. Raises ValueError for no samples or a bad number.
    """
    if len(index_classes) == 0 or global_batch < 1 or seed < 0 or epoch < 0:
        raise ValueError(
            f"num_samples={len(index_classes)} and global_batch={global_batch} must be positive, "
            f"seed={seed} and epoch={epoch} not negative"
        )
    classes = index_classes if pure_classes else np.zeros(len(index_classes), np.int8)
    batches = []
    for name in np.unique(classes):
        members = np.flatnonzero(classes == name)
        num_steps = -(-len(members) // global_batch)
        slots = np.full(num_steps * global_batch, PADDING, np.int64)
        slots[: len(members)] = members[_permutation(len(members), seed, epoch, 1 + int(name))]
        batches.append(slots.reshape(num_steps, global_batch))
    plan = np.concatenate(batches)
    return plan[_permutation(len(plan), seed, epoch, 0)]


class StepPlan:
    """plan_epoch over epochs without end: the slots of any step.

    Holds the plan of the epoch last asked for, 8 bytes a sample.
    """

    def __init__(
        self, index: ShardIndex, seed: int, global_batch: int, *, pure_classes: bool = True
    ) -> None:
        self.seed = seed
        self.global_batch = global_batch
        self.pure_classes = pure_classes
        self._classes = index.classes
        self._epoch = 0
        self._plan = self._make(0)
        self.steps_per_epoch = len(self._plan)

    def slots(self, step: int) -> np.ndarray:
        """int64 [global_batch], read-only, of step >= 0 counted over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, row = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._make(epoch)
        return self._plan[row]

    def _make(self, epoch: int) -> np.ndarray:
        plan = plan_epoch(
            self._classes,
            seed=self.seed,
            epoch=epoch,
            global_batch=self.global_batch,
            pure_classes=self.pure_classes,
        )
        plan.flags.writeable = False  # a caller's in-place change would alter later steps
        return plan


class FirstSamples:
    """A plan for validation: samples 0..count-1 in order, whatever the batch size."""

    def __init__(self, count: int, global_batch: int) -> None:
        self.count = count
        self.global_batch = global_batch
        self.steps_per_epoch = -(-count // global_batch)

    def slots(self, step: int) -> np.ndarray:
        """int64 [global_batch]; -1 behind the last sample."""
        slots = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        return np.where(slots < self.count, slots, PADDING)


def deal(
    slots: np.ndarray, costs: np.ndarray, num_micro_batches: int, micro_batch: int
) -> np.ndarray:
    """Deal one step's slots to world_size * accumulation micro-batches of balanced cost.

    slots: int64 [num_micro_batches * micro_batch]; costs: [num_samples] (ShardIndex.costs).
    Returns int64 [num_micro_batches, micro_batch] with the same slots. Dealt by falling cost in
    snake order, -1 last. Neighbouring rows cost about the same: give rows that run at the same
    time on different ranks neighbouring numbers. Raises ValueError when sizes do not fit.
    """
    if slots.ndim != 1 or len(slots) != num_micro_batches * micro_batch:
        raise ValueError(
            f"{slots.shape} slots cannot fill {num_micro_batches} micro-batches of {micro_batch}"
        )
    slot_costs = np.where(slots == PADDING, -1, costs[np.maximum(slots, 0)])
    by_cost = slots[np.argsort(-slot_costs, kind="stable")]  # ties keep the plan's order
    rounds = by_cost.reshape(micro_batch, num_micro_batches)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return np.ascontiguousarray(rounds.T)


def _permutation(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Permutation [count] from Philox words.

    Generator.shuffle may change between NumPy releases, raw bit-generator words may not
    (NEP 19); a plan must mean the same after an upgrade in the middle of a run.
    """
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, 0, stream, PLAN_VERSION], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(words, kind="stable")
