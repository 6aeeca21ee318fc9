"""Opens what a stage reads: samples in order, validation samples, the teacher's rows on disk."""

import math
from dataclasses import dataclass

import numpy as np

from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.features import FeatureWriter
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairDataset, PairEncoders
from genrecal_ds.data.plan import PADDING, Order, StepPlan
from genrecal_ds.models.config_file import text_width
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.inputs import Inputs
from genrecal_ds.training.teacher_cache import Caches
from genrecal_ds.training.weights import DTYPES, load_teacher


@dataclass(frozen=True)
class StageData:
    """The data of a stage. writer: keeps the rows of a teacher that runs while a cache is named."""

    training: PairDataset
    validation: PairDataset | None
    plan: StepPlan
    writer: FeatureWriter | None = None


def open_data(
    recipe: Recipe, stage: StageConfig, inputs: Inputs, matcher: ByteMatcher | None
) -> StageData:
    """Open a stage's data; a collective. Raises UserError if the teacher's rows do not fit on disk.

    A stage that reads a cache fills it first: for missing rows the teacher is loaded and then
    freed.
    """
    reads = _Reads(recipe, stage, inputs)
    encoders = (reads.encoders, reads.encoders)
    writer = None
    if reads.cache is not None:
        if recipe.reads_cache(stage):
            encoders = reads.fill()
        else:
            writer = reads.cache.writer_with_room(reads.index, reads.samples(), reads.width)

    def dataset(index: ShardIndex, of: PairEncoders) -> PairDataset:
        return PairDataset(index, of, stage.has_regular, matcher)

    validation = reads.validation and dataset(reads.validation, encoders[1])
    return StageData(dataset(reads.index, encoders[0]), validation, reads.plan, writer)


def fill_cache(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> None:
    """Write the teacher's rows that the stage will read. A collective."""
    _Reads(recipe, stage, inputs).fill()


class _Reads:
    """A stage's shards with their order, and the cache of its teacher's rows."""

    def __init__(self, recipe: Recipe, stage: StageConfig, inputs: Inputs):
        self.recipe, self.stage, data = recipe, stage, recipe.data
        has_teacher, folder = stage.facts.has_teacher, stage.data or data.train
        self.encoders = inputs.encoders[has_teacher]
        self.index = inputs.indices[folder]
        self.validation = inputs.indices[data.validation] if data.validation else None
        lengths = inputs.lengths[folder, has_teacher]
        self.plan = StepPlan(Order(
            self.index.classes,
            lengths.values,
            lengths.digest,
            seed=recipe.seed if stage.seed is None else stage.seed,
            global_batch=recipe.global_batch(stage),
            window=data.length_window,
        ))  # fmt: skip
        self.cache = None
        if has_teacher and recipe.teacher and recipe.teacher.cache:
            self.cache = Caches.of(recipe, self.encoders)

    @property
    def width(self) -> int:
        """Return the teacher's hidden size."""
        assert self.recipe.teacher is not None
        return text_width(self.recipe.teacher.path)

    def samples(self) -> np.ndarray:
        """List the numbers of all samples that the stage trains on, each once."""
        stage, steps_per_epoch = self.stage, self.plan.steps_per_epoch
        epochs = stage.epochs or (stage.steps or 0) / steps_per_epoch
        if epochs >= 1:
            return np.arange(len(self.index))
        steps = range(math.ceil(epochs * steps_per_epoch))
        slots = np.concatenate([self.plan.slots(step) for step in steps])
        return np.unique(slots[slots != PADDING])

    def fill(self) -> tuple[PairEncoders, PairEncoders]:
        """Write missing rows; return (training's, validation's) encoders, which read the rows."""
        assert self.cache is not None
        needed = [(self.index, self.samples())]
        if self.validation:
            shown = np.arange(min(self.recipe.log.validation_samples, len(self.validation)))
            if self.validation.fingerprint == self.index.fingerprint:  # one folder, one writer
                needed = [(self.index, np.union1d(needed[0][1], shown))]
            else:
                needed.append((self.validation, shown))
        self.cache.fill(needed, self.width, lambda: load_teacher(self.recipe))
        dtype = DTYPES[self.recipe.precision]
        reading = [self.cache.reading(index, self.width, dtype) for index, _ in needed]
        return reading[0], reading[-1]
