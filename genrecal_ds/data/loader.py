"""Shards -> this rank's micro-batches, step by step, resumable at any step.

    plan.slots(step) -> deal over ranks and micro-steps -> read -> encode_pair -> collate

Map-style: the order is the plan's for any number of workers, so the state to resume is the
number of the next step.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from genrecal_ds.data.batch import PairBatch, collate
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.pair import Encoder, Pair, Unusable, encode_pair
from genrecal_ds.data.plan import PADDING, FirstSamples, StepPlan, deal
from genrecal_ds.data.reader import BadSample, ShardReader

# A worker that hangs (a dead network mount) must end the run with an error, not freeze it.
WORKER_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class PairEncoders:
    """Both sides' encoders with their collate rules; teacher is None in stages without one."""

    student: Encoder
    teacher: Encoder | None = None

    def encode(self, messages: list, images: list[Image.Image]) -> Pair:
        return encode_pair(messages, images, self.teacher, self.student)

    @property
    def vision_rules(self) -> tuple[dict[str, str] | None, dict[str, str]]:
        return (self.teacher.vision_rules if self.teacher else None), self.student.vision_rules

    def placeholder(self) -> Pair:
        """A conversation about a grey picture that teaches nothing; see batch.collate."""
        question = [{"type": "image"}, {"type": "text", "text": "x"}]
        answer = [{"type": "text", "text": "x"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        pair = self.encode(messages, [Image.new("RGB", (56, 56), (128, 128, 128))])
        return Pair(pair.teacher, pair.student, is_placeholder=True)


class PairDataset(Dataset):
    """Item = the slots of one micro-batch -> PairBatch. Pickles for workers."""

    def __init__(self, index: ShardIndex, encoders: PairEncoders, with_regular: bool):
        self.reader = ShardReader(index)
        self.encoders, self.with_regular = encoders, with_regular
        self.placeholder = encoders.placeholder()

    def __getitem__(self, slots: tuple[int, ...]) -> PairBatch:
        pairs, rejects = [], []
        for slot in slots:
            if slot == PADDING:
                continue
            try:
                sample = self.reader.read(slot)
                pairs.append(self.encoders.encode(sample.messages, sample.images))
            except Unusable as error:
                rejects.append(str(error))
            except BadSample as error:
                rejects.append(f"unreadable: {error}")
        return collate(
            pairs, self.placeholder, self.encoders.vision_rules, self.with_regular, tuple(rejects)
        )


def micro_batches(
    dataset: PairDataset,
    plan: StepPlan | FirstSamples,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[PairBatch]]:
    """This rank's micro-batches of every step in [first_step, last_step), one list per step.

    What a step trains on does not depend on world_size; only who computes it does.
    """
    accumulation = plan.global_batch // (micro_batch * world_size)
    make = partial(
        _rank_slots, plan, dataset.reader.index.costs(),
        rank=rank, world_size=world_size, micro_batch=micro_batch,
    )  # fmt: skip
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_StepSlots(make, range(first_step, last_step)),
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT_SECONDS if num_workers else 0,
        worker_init_fn=_ignore_signals if num_workers else None,
        persistent_workers=False,
    )
    batches = iter(loader)
    for _ in range(first_step, last_step):
        yield [next(batches) for _ in range(accumulation)]


class _StepSlots:
    """The loader's sampler: plans a step only when the loader comes to it."""

    def __init__(self, make: Callable[[int], list[tuple[int, ...]]], steps: range):
        self._make, self._steps = make, steps

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for step in self._steps:
            yield from self._make(step)


def _rank_slots(
    plan: StepPlan | FirstSamples,
    costs: np.ndarray,
    step: int,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
) -> list[tuple[int, ...]]:
    """Neighbouring deals cost alike: they go to different ranks of the same micro-step."""
    slots = plan.slots(step)
    table = deal(slots, costs, len(slots) // micro_batch, micro_batch)
    return [tuple(int(slot) for slot in row) for row in table[rank::world_size]]


def _ignore_signals(worker: int) -> None:
    """The ranks decide about stopping; a worker that dies first would take the checkpoint along."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
