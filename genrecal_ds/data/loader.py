"""Yields this rank's micro-batches from shards, step by step, resumable at any step.

    plan.slots(step) -> deal over ranks and micro-steps -> read -> encode_pair -> collate

The data set is map-style: the plan decides the order for any number of workers, so a resume needs
only the number of the next step.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genrecal_ds.data.batch import PairBatch, collate
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.features import CachedView, Features, FeatureStore, kept_rows
from genrecal_ds.data.handover import packed, unpacked
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.pair import (
    Encoder,
    LongPolicy,
    Pair,
    TooLong,
    Unusable,
    encode_pair,
    encode_pairs,
    first_turns,
)
from genrecal_ds.data.plan import PADDING, GivenSamples, StepPlan
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.errors import UserError

# A worker that hangs (a dead network mount) must end the run with an error, not freeze it.
WORKER_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class PairEncoders:
    """Holds both sides' encoders and collate rules; teacher is None in stages without one."""

    student: Encoder
    teacher: Encoder | None = None
    too_long: LongPolicy = "drop"

    @property
    def by_side(self) -> dict[str, Encoder]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return {**teacher, "student": self.student}

    def encode(
        self, messages: list, images: list[Image.Image], number: int = PADDING
    ) -> list[Pair]:
        """Encode a sample: one pair, or one a turn. number: for those that keep something of it."""
        return encode_pairs(messages, images, self.by_side, self.too_long)

    @property
    def vision_rules(self) -> tuple[dict[str, str] | None, dict[str, str]]:
        return (self.teacher.vision_rules if self.teacher else None), self.student.vision_rules

    def placeholder(self) -> Pair:
        """A conversation that teaches nothing, about a grey picture where all models see; see
        batch.collate."""
        has_picture = all(encoder.reads_images for encoder in self.by_side.values())
        images = [Image.new("RGB", (56, 56), (128, 128, 128))] if has_picture else []
        question = [{"type": "image"}] * len(images) + [{"type": "text", "text": "x"}]
        answer = [{"type": "text", "text": "x"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        pair = encode_pair(messages, images, self.by_side, self.too_long)
        return replace(pair, is_placeholder=True, is_truncated=False)


@dataclass(frozen=True)
class CachedPairEncoders(PairEncoders):
    """Takes the teacher's side from disk: no picture is prepared for it and no text tokenised.

    The teacher's view holds only the answers, each behind one token in place of its question. The
    teacher's rows for these answers are its only vision input. too_long: drop or error.
    """

    features: FeatureStore | None = None
    empty_row_1H: Tensor | None = None  # of the placeholder

    @property
    def vision_rules(self) -> tuple[dict[str, str] | None, dict[str, str]]:
        return {"rows": "rows"}, self.student.vision_rules

    def encode(
        self, messages: list, images: list[Image.Image], number: int = PADDING
    ) -> list[Pair]:
        assert self.features is not None
        stored = self.features.read(number)
        if stored is None:
            raise Unusable("left out when the teacher's rows were written")
        messages = first_turns(messages, len(stored.turn_lengths))
        encoders: dict[str, Encoder] = {"teacher": CachedView(stored), "student": self.student}
        pairs = encode_pairs(messages, images, encoders, self.too_long)
        return [replace(pair, teacher=kept_rows(pair.sides[0])) for pair in pairs]

    def placeholder(self) -> Pair:
        pair = super().placeholder()
        assert pair.teacher is not None and self.empty_row_1H is not None
        (start, end), *_ = pair.teacher.answers
        length = end - start
        rows = self.empty_row_1H.expand(length + 1, -1)
        view = CachedView(Features(rows, torch.zeros(length + 1, dtype=torch.int64), (length,)))
        return replace(pair, teacher=view.encode([], []))


class PairDataset(Dataset):
    """Item = the slots of one micro-batch -> PairBatch. Pickles for workers."""

    def __init__(
        self,
        index: ShardIndex,
        encoders: PairEncoders,
        with_regular: bool,
        matcher: ByteMatcher | None = None,
    ):
        self.reader = ShardReader(index)
        self.encoders, self.with_regular, self.matcher = encoders, with_regular, matcher
        self.placeholder = encoders.placeholder()

    def __getitem__(self, slots: tuple[int, ...]) -> PairBatch:
        """Make the micro-batch of these samples. Raises UserError where too_long is error.

        A sample that cannot be used is left out and counted. collate makes sure that the batch
        still calls the same modules as other ranks'.
        """
        real = tuple(slot for slot in slots if slot != PADDING)
        pairs: list[Pair] = []
        used, turns_of, unreadable = [], [], []
        unusable, unusable_ids, unusable_keys = [], [], []
        for slot, sample in zip(real, self.reader.read_many(real), strict=True):
            if isinstance(sample, BadSample):
                unreadable.append(str(sample))
                continue
            try:
                own = self.encoders.encode(sample.messages, sample.images, slot)
                pairs += own
                used.append(slot)
                turns_of.append(sum(len(pair.student.answers) for pair in own))
            except TooLong as error:
                raise UserError(
                    f"sample {slot}, key {sample.key}: {error}; raise max_length, or set "
                    "data.too_long to drop or truncate_question"
                ) from None
            except Unusable as error:
                unusable.append(str(error))
                unusable_ids.append(slot)
                unusable_keys.append(sample.key)
        return self.collate(pairs)._replace(
            num_samples=len(used), sample_ids=real, used_ids=tuple(used), turns_of=tuple(turns_of),
            unusable=tuple(unusable), unusable_ids=tuple(unusable_ids),
            unusable_keys=tuple(unusable_keys), unreadable=tuple(unreadable),
        )  # fmt: skip

    def collate(self, pairs: list[Pair]) -> PairBatch:
        encoders = self.encoders
        return collate(
            pairs, self.placeholder, encoders.vision_rules, self.with_regular, self.matcher
        )  # fmt: skip


def micro_batches(
    dataset: PairDataset,
    plan: StepPlan | GivenSamples,
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

    What a step trains on does not depend on world_size; only who computes it does. A worker that
    dies or hangs raises RuntimeError: never a wait without end, never an epoch that ends early.
    """
    accumulation = plan.global_batch // (micro_batch * world_size)
    is_closing = multiprocessing.RawValue("b", 0)
    # Behind an uncaught error this generator is closed only after Python has waited for workers.
    atexit.register(setattr, is_closing, "value", 1)
    # torch's default collate function would convert what it meets, so there is always another one.
    sent: Callable[[Any], Any] = packed if num_workers else _unchanged
    received: Callable[[Any], PairBatch] = unpacked if num_workers else _unchanged
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_StepSlots(plan, range(first_step, last_step), rank, world_size, micro_batch),
        num_workers=num_workers,
        collate_fn=sent,
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT_SECONDS if num_workers else 0,
        worker_init_fn=partial(_leave_signals_to_the_rank, is_closing) if num_workers else None,
        persistent_workers=False,
    )
    try:
        batches = iter(loader)
        for _ in range(first_step, last_step):
            yield [received(next(batches)) for _ in range(accumulation)]
    except UserError as error:
        # The frames of the error's traceback hold the loader in a circle. The garbage collector
        # would end the circle's queues first, and every worker would take 5 s to end.
        error.__traceback__ = None
        # An error from a worker has a traceback as its text. A user needs the last line.
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None
    except (EOFError, ConnectionError) as error:  # how a worker's end may show first
        raise RuntimeError("a data worker ended in the middle of a batch") from error
    finally:
        is_closing.value = 1


def _unchanged(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class _StepSlots:
    """The loader's sampler: plans a step only when the loader comes to it."""

    plan: StepPlan | GivenSamples
    steps: range
    rank: int
    world_size: int
    micro_batch: int

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for step in self.steps:
            dealt = self.plan.micro_batches(step, self.micro_batch, self.world_size)
            for slots in dealt[:, self.rank]:
                yield tuple(int(slot) for slot in slots)


def _leave_signals_to_the_rank(is_closing: Any, worker: int) -> None:
    """Ignore signals in a worker: the ranks decide about stopping, and save before they stop.

    A worker that dies first would prevent the checkpoint. Once the rank needs no more batches,
    SIGTERM ends the workers as usual: a hung worker that ignored it would keep the rank alive.
    """

    def end_if_closing(number: int, frame: Any) -> None:
        if is_closing.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_if_closing)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
