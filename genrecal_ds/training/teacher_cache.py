"""Writes the teacher's rows beside stage 1, so that stage 2 reads them instead of running it.

align      runs the teacher, and what it needs anyway goes to disk (a by-product)
distill    rows that are missing are computed first, the teacher is freed, and from then on
           no body of it is on any device; only its head is
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genrecal_ds import IGNORE, dist
from genrecal_ds.data.batch import PairBatch, SideBatch, to_device
from genrecal_ds.data.features import SCALED_TOGETHER, Features, FeatureStore, FeatureWriter
from genrecal_ds.data.index import ShardIndex, file_sha256
from genrecal_ds.data.loader import CachedPairEncoders, PairDataset, PairEncoders, micro_batches
from genrecal_ds.data.plan import GivenSamples
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.training.engine import Teacher

ENCODED_FOR_AN_ESTIMATE = 16  # samples; their mean times all is what is said before writing
WIDTHS = {"fp32": 4, "bf16": 2}  # bytes


class TeacherFromCache:
    """In a teacher engine's place: hands out the rows that came with the batch."""

    module: nn.Module | None = None

    def __call__(
        self, inputs: SideBatch, rows_A: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As TeacherBody.forward; inputs.vision holds the rows, sample after sample."""
        rows_PH = inputs.vision["rows"]
        flat = rows_PH.new_zeros(inputs.input_ids.numel(), rows_PH.shape[1])
        flat = flat.index_copy(0, inputs.real_P, rows_PH)
        return flat.index_select(0, rows_A), flat.index_select(0, targets_N)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Caches:
    """Where a recipe's teacher keeps its rows: a folder for each data set."""

    recipe: Recipe
    encoders: PairEncoders  # of both sides
    facts: dict[str, Any]  # of the identity, but for the data

    @classmethod
    def of(cls, recipe: Recipe, encoders: PairEncoders) -> "Caches":
        """A collective: the ranks share the teacher's files to be hashed."""
        source = recipe.teacher
        assert source is not None and encoders.teacher is not None
        files = sorted(source.path.glob("*.safetensors"))
        mine = {path.name: file_sha256(path) for path in files[dist.rank() :: dist.world_size()]}
        hashes: dict[str, str] = {}
        for of_rank in dist.gather_objects(mine):
            hashes |= of_rank
        listed = "\n".join(f"{name} {digest}" for name, digest in sorted(hashes.items()))
        return cls(recipe, encoders, {
            "weights": hashlib.sha256(listed.encode()).hexdigest(),
            "tokens": encoders.teacher.digest,
            "max_length": source.max_length,
            "too_long": recipe.data.too_long,
            "precision": recipe.precision,
            "rows": source.cache_rows,
            "weights_in_8_bits": source.placement == "replica_int8",
        })  # fmt: skip

    def folder(self, index: ShardIndex) -> Path:
        assert self.recipe.teacher is not None and self.recipe.teacher.cache is not None
        return self.recipe.teacher.cache / index.fingerprint[:16]

    def identity(self, index: ShardIndex) -> dict[str, Any]:
        return {**self.facts, "data": index.fingerprint}

    def writer(self, index: ShardIndex) -> FeatureWriter:
        return FeatureWriter(self.folder(index), self.identity(index), dist.rank())

    def writer_with_room(self, index: ShardIndex, samples: np.ndarray, width: int) -> FeatureWriter:
        """For a stage that will see these samples. A collective; see check_room."""
        writer = self.writer(index)
        self.check_room(index, dist.from_main(writer.missing(samples)), width)
        return writer

    def check_room(self, index: ShardIndex, samples: np.ndarray, width: int) -> None:
        """Say how large these samples' rows will be. A collective.

        Raises UserError, on every rank, where the disk has less room: a full disk would stop the
        run as well, by the same fix, but hours later.
        """
        refusal = None
        if dist.is_main() and len(samples):
            try:  # the other ranks wait for what is said here
                refusal = self._refusal_for_room(index, samples, width)
            except UserError as error:
                refusal = str(error)
        dist.raise_together(refusal)

    def _refusal_for_room(self, index: ShardIndex, samples: np.ndarray, width: int) -> str | None:
        needed = int(len(samples) * self._bytes_of_a_sample(index, samples, width))
        free, gib = shutil.disk_usage(self.folder(index)).free, 2**30
        said = (
            f"teacher.cache: about {needed / gib:.2f} GiB for {len(samples):,} samples into "
            f"{self.folder(index)}, {free / gib:.2f} GiB free"
        )
        print(said, flush=True)
        if needed <= free:
            return None
        return f"{said}; make room, or set teacher.cache_rows: int8 or fewer steps"

    def _bytes_of_a_sample(self, index: ShardIndex, samples: np.ndarray, width: int) -> float:
        """A mean over some that are spread evenly."""
        places = np.linspace(0, len(samples) - 1, ENCODED_FOR_AN_ESTIMATE).round().astype(int)
        chosen = tuple(int(sample) for sample in np.unique(samples[places]))
        batch = PairDataset(index, self.encoders, with_regular=False)[chosen]
        rows = batch.num_teacher_rows + sum(batch.turns_of)
        assert self.recipe.teacher is not None
        of_row = width * WIDTHS[self.recipe.precision]
        if self.recipe.teacher.cache_rows == "int8":
            of_row = width + 4 * -(-width // SCALED_TOGETHER)
        return rows * (of_row + 4) / len(chosen)  # 4: of a token's id

    def fill(
        self,
        needed: list[tuple[ShardIndex, np.ndarray]],
        width: int,
        load_teacher: Callable[[], Teacher],
    ) -> None:
        """Compute what is missing of these samples, each once; the teacher is loaded only then.

        A collective. Killed and started again it goes on with what is not there yet.
        """
        writers = [self.writer(index) for index, _ in needed]
        dist.barrier()  # every rank has seen the same blocks
        missing = [
            dist.from_main(writer.missing(samples))
            for (_, samples), writer in zip(needed, writers, strict=True)
        ]
        if not any(map(len, missing)):
            return
        for (index, _), samples in zip(needed, missing, strict=True):
            self.check_room(index, samples, width)
        teacher = load_teacher()
        for (index, _), writer, samples in zip(needed, writers, missing, strict=True):
            self._fill(index, samples, writer, teacher)
            dist.raise_together(flushed(writer))
        teacher.close()
        dist.barrier()

    @torch.no_grad()
    def _fill(
        self, index: ShardIndex, samples: np.ndarray, writer: FeatureWriter, teacher: Teacher
    ) -> None:
        micro_batch = self.recipe.batch.micro_batch
        # Like lengths together: the order is nobody's concern here, the padding is the teacher's.
        samples = samples[np.argsort(index.costs()[samples], kind="stable")]
        plan = GivenSamples(samples, micro_batch * dist.world_size())
        batches = micro_batches(
            PairDataset(index, self.encoders, with_regular=False), plan, first_step=0,
            last_step=plan.steps_per_epoch, rank=dist.rank(), world_size=dist.world_size(),
            micro_batch=micro_batch, num_workers=self.recipe.data.num_workers,
        )  # fmt: skip
        for step, micro in enumerate(batches):
            for batch in micro:
                batch = to_device(batch, dist.device())
                assert batch.teacher is not None
                view = batch.teacher
                keep(writer, batch, *teacher(view.inputs, view.rows_A, view.targets_N))
            if dist.is_main() and step % max(1, plan.steps_per_epoch // 10) == 0:
                print(f"teacher.cache: {step}/{plan.steps_per_epoch} batches", flush=True)

    def reading(self, index: ShardIndex, width: int, dtype: torch.dtype) -> CachedPairEncoders:
        """Encoders whose teacher side is what was written. Raises UserError; see FeatureStore."""
        store = FeatureStore(self.folder(index), self.identity(index))
        encoders = self.encoders
        return CachedPairEncoders(
            encoders.student, encoders.teacher, encoders.too_long, features=store,
            empty_row_1H=torch.zeros(1, width, dtype=dtype),
        )  # fmt: skip


def flushed(writer: FeatureWriter) -> str | None:
    """Put all of it onto the disk; what that said, as a line for dist.raise_together."""
    try:
        writer.flush()
    except OSError as error:
        return f"teacher.cache: {error}; make room and start again, whole blocks stay"
    return None


def keep(writer: FeatureWriter, batch: PairBatch, inputs_AH: Tensor, targets_NH: Tensor) -> None:
    """Write what a micro-batch's teacher rows say of each sample; unusable ones as such."""
    assert batch.teacher is not None
    # The copy waits for the device: once a micro-batch, and the head's loss comes after it.
    targets, answers = targets_NH.cpu(), inputs_AH[: len(targets_NH)].cpu()
    labels = batch.teacher.labels_N.cpu()
    starts = batch.teacher.boundary_N.nonzero().flatten().tolist()
    turns = list(zip(starts, [*starts[1:], len(labels)], strict=True))
    for sample, num_turns in zip(batch.used_ids, batch.turns_of, strict=True):
        own, turns = turns[:num_turns], turns[num_turns:]
        rows, tokens = [], []
        for first, last in own:
            # The row that predicts the first answer token stands before the answer's own.
            rows += [targets[first : first + 1], answers[first:last]]
            tokens += [labels.new_zeros(1), labels[first:last]]
        joined = torch.cat(tokens)
        assert not (joined == IGNORE).any(), "a placeholder's rows are nobody's"
        lengths = tuple(last - first for first, last in own)
        writer.add(sample, Features(torch.cat(rows), joined, lengths))
    for sample in batch.unusable_ids:
        nothing = torch.empty(0, targets.shape[1], dtype=targets.dtype)
        writer.add(sample, Features(nothing, torch.empty(0, dtype=torch.int64), ()))
