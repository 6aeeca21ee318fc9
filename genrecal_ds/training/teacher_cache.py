"""Caches the teacher's rows: stage 1 writes them, stage 2 reads them and runs no teacher.

align      runs the teacher and writes to disk the rows that the stage needs anyway
distill    first computes rows that are missing, then frees the teacher; from then on only the
           teacher's head is on a device, not its body
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

ENCODED_FOR_AN_ESTIMATE = 16  # samples; their mean size gives the estimate
WIDTHS = {"fp32": 4, "bf16": 2}  # bytes


class TeacherFromCache:
    """Stands for a teacher engine and hands out the rows that came with the batch."""

    module: nn.Module | None = None

    def __call__(
        self, inputs: SideBatch, rows_A: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what TeacherBody.forward would; inputs.vision holds the rows of all samples."""
        rows_PH = inputs.vision["rows"]
        flat = rows_PH.new_zeros(inputs.input_ids.numel(), rows_PH.shape[1])
        flat = flat.index_copy(0, inputs.real_P, rows_PH)
        return flat.index_select(0, rows_A), flat.index_select(0, targets_N)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Caches:
    """The folders for the rows of a recipe's teacher: one folder for each data set."""

    recipe: Recipe
    encoders: PairEncoders  # for both sides
    facts: dict[str, Any]  # the identity without the data

    @classmethod
    def of(cls, recipe: Recipe, encoders: PairEncoders) -> "Caches":
        """Hash the teacher's files, shared among the ranks. A collective."""
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
        """Return a writer for a stage's samples; check the disk's room. A collective."""
        writer = self.writer(index)
        self.check_room(index, dist.from_main(writer.missing(samples)), width)
        return writer

    def check_room(self, index: ShardIndex, samples: np.ndarray, width: int) -> None:
        """Say how large these samples' rows will be. A collective.

        Raises UserError on every rank if the disk has less room: a full disk would stop the run
        too, and need the same fix, but hours later.
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
        """Estimate the bytes of a sample by the mean of a few evenly spread samples."""
        places = np.linspace(0, len(samples) - 1, ENCODED_FOR_AN_ESTIMATE).round().astype(int)
        chosen = tuple(int(sample) for sample in np.unique(samples[places]))
        batch = PairDataset(index, self.encoders, with_regular=False)[chosen]
        rows = batch.num_teacher_rows + sum(batch.turns_of)
        assert self.recipe.teacher is not None
        of_row = width * WIDTHS[self.recipe.precision]
        if self.recipe.teacher.cache_rows == "int8":
            of_row = width + 4 * -(-width // SCALED_TOGETHER)
        return rows * (of_row + 4) / len(chosen)  # 4: a token's id

    def fill(
        self,
        needed: list[tuple[ShardIndex, np.ndarray]],
        width: int,
        load_teacher: Callable[[], Teacher],
    ) -> None:
        """Compute the missing rows of these samples, each once; load the teacher only if any miss.

        A collective. After a kill and a new start it goes on with the rows that are missing.
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
        # Like lengths together: the order does not matter here, the teacher pads less.
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
        """Return encoders with the written rows as teacher. Raises UserError; see FeatureStore."""
        store = FeatureStore(self.folder(index), self.identity(index))
        encoders = self.encoders
        return CachedPairEncoders(
            encoders.student, encoders.teacher, encoders.too_long, features=store,
            empty_row_1H=torch.zeros(1, width, dtype=dtype),
        )  # fmt: skip


def flushed(writer: FeatureWriter) -> str | None:
    """Write all rows to disk; return an error as a line for dist.raise_together."""
    try:
        writer.flush()
    except OSError as error:
        return f"teacher.cache: {error}; make room and start again, whole blocks stay"
    return None


def keep(writer: FeatureWriter, batch: PairBatch, inputs_AH: Tensor, targets_NH: Tensor) -> None:
    """Write a micro-batch's teacher rows by sample; mark unusable samples as such."""
    assert batch.teacher is not None
    # The copy waits for the device once a micro-batch; the head's loss comes after the copy.
    targets, answers = targets_NH.cpu(), inputs_AH[: len(targets_NH)].cpu()
    labels = batch.teacher.labels_N.cpu()
    starts = batch.teacher.boundary_N.nonzero().flatten().tolist()
    turns = list(zip(starts, [*starts[1:], len(labels)], strict=True))
    for sample, num_turns in zip(batch.used_ids, batch.turns_of, strict=True):
        own, turns = turns[:num_turns], turns[num_turns:]
        rows, tokens = [], []
        for first, last in own:
            # The row that predicts the first answer token stands before the answer's own rows.
            rows += [targets[first : first + 1], answers[first:last]]
            tokens += [labels.new_zeros(1), labels[first:last]]
        joined = torch.cat(tokens)
        assert not (joined == IGNORE).any(), "a placeholder's rows are never written"
        lengths = tuple(last - first for first, last in own)
        writer.add(sample, Features(torch.cat(rows), joined, lengths))
    for sample in batch.unusable_ids:
        nothing = torch.empty(0, targets.shape[1], dtype=targets.dtype)
        writer.add(sample, Features(nothing, torch.empty(0, dtype=torch.int64), ()))
