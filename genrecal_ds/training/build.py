"""A recipe's stage becomes the parts a Trainer runs: data, engines, objective, exporter.

The only place where models, data and engines meet.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.data.features import FeatureWriter
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairDataset, PairEncoders
from genrecal_ds.data.plan import PADDING, Order, StepPlan
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.lora import merged
from genrecal_ds.models.recalibrator import save_recalibrator
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives.report import Clock
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.recipe_file import load_ds_config
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.engine import (
    StudentEngine,
    Teacher,
    monitor_config,
)
from genrecal_ds.training.in_loop_scores import InLoopScores
from genrecal_ds.training.inputs import Inputs
from genrecal_ds.training.objective import alignment_of, build_objective
from genrecal_ds.training.on_policy import OnPolicy
from genrecal_ds.training.progress import host_memory_gib
from genrecal_ds.training.stages import freeze
from genrecal_ds.training.teacher_cache import Caches, TeacherFromCache
from genrecal_ds.training.weights import (
    DTYPES,
    load_student,
    load_teacher,
    recalibrator_folder_of,
    refuse_other_architecture,
    teacher_width,
)


@dataclass
class StageParts:
    """What a Trainer needs, by interface only."""

    dataset: PairDataset
    plan: StepPlan
    validation: PairDataset | None
    student: StudentEngine
    teacher: Teacher | TeacherFromCache | None
    writer: FeatureWriter | None  # of the teacher's rows
    export: Callable[[Path], None]  # a collective: writes the stage's result folders
    answer: Callable[[], dict[str, float]] | None  # a collective: scores of the student's answers
    # a collective: a step's micro-batches with answers that the student gives itself
    own_answers: Callable[[int, list[PairBatch]], list[PairBatch]] | None
    clock: Clock
    facts: dict[str, Any]  # of this start: versions, where pixels come from, memory of every rank
    more_teachers: tuple[Teacher, ...] = ()

    @property
    def teachers(self) -> tuple[Teacher | TeacherFromCache, ...]:
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    def close(self) -> None:
        self.student.close()
        for teacher in self.teachers:
            teacher.close()


def build_stage(
    recipe: Recipe, stage: StageConfig, inputs: Inputs, student_folder: Path,
    recalibrator_folder: Path | None,
) -> StageParts:  # fmt: skip
    """Load weights sharded, build both engines and the stage's data."""
    clock = Clock()
    encoders = inputs.encoders[stage.needs_teacher]
    with_regular = stage.kind == "align" and stage.losses.regularizer != "none"
    index, plan, validation = _data(recipe, stage, inputs)
    cache = None
    if stage.needs_teacher and recipe.teacher and recipe.teacher.cache:
        cache = Caches.of(recipe, encoders)
    is_cached = recipe.reads_cache(stage)
    train_encoders = validation_encoders = encoders
    if cache and is_cached:
        train_encoders, validation_encoders = _cached(cache, recipe, stage, plan, index, validation)

    writer = None
    if cache and not is_cached:
        width = teacher_width(recipe)
        writer = cache.writer_with_room(index, _samples_of(stage, plan, index), width)

    scores = _in_loop_scores(recipe, stage, inputs)
    alignment = alignment_of(stage, encoders)
    refuse_other_architecture(student_folder, recipe.student.path)
    torch.manual_seed(recipe.seed)  # a fresh Recalibrator is the same on every rank
    student = load_student(student_folder, recipe)
    freeze(student, stage)
    objective = build_objective(
        recipe, stage, student, recalibrator_folder, encoders, clock, alignment
    )
    teachers = _teachers(recipe, stage)
    run_folder = recipe.run_dir / stage.name
    engine = StudentEngine(
        objective,
        load_ds_config(recipe.deepspeed.student),
        recipe.precision,
        recipe.optimizer,
        recipe.accumulation_steps(stage, dist.world_size()),
        monitor_config(run_folder, recipe.log.tensorboard, recipe.log.wandb),
    )
    _check_logits(student, encoders.student)
    answer = None if scores is None else (lambda: scores(engine.module.student))
    for teacher, encoder in zip(teachers, encoders.teachers, strict=True):
        if teacher.module is not None:
            _check_logits(teacher.module.teacher, encoder)
    dataset = PairDataset(index, train_encoders, with_regular, alignment)
    return StageParts(
        dataset=dataset,
        plan=plan,
        validation=validation
        and PairDataset(validation, validation_encoders, with_regular, alignment),
        student=engine,
        teacher=teachers[0] if teachers else None,
        writer=writer,
        export=_exporter(engine, student_folder, recipe),
        answer=answer,
        own_answers=_own_answers(stage, dataset, engine, recipe.seed),
        clock=clock,
        facts={**_facts(encoders), "teacher": _teacher_in_words(recipe, stage)},
        more_teachers=tuple(teachers[1:]),
    )


def _teachers(recipe: Recipe, stage: StageConfig) -> list[Teacher | TeacherFromCache]:
    """Those that the stage runs, in the recipe's order."""
    if not stage.needs_teacher:
        return []
    if recipe.reads_cache(stage):
        return [TeacherFromCache()]
    return [load_teacher(recipe, number) for number in range(len(recipe.teachers))]


def _own_answers(
    stage: StageConfig, dataset: PairDataset, engine: StudentEngine, seed: int
) -> Callable[[int, list[PairBatch]], list[PairBatch]] | None:
    if not stage.on_policy.share:
        return None
    on_policy = OnPolicy(dataset, stage.on_policy, seed)
    return lambda step, micro: on_policy(engine.module.student, step, micro)


def fill_cache(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> None:
    """Write what the stage will read in its teacher's place, where it is not there yet."""
    cache = Caches.of(recipe, inputs.encoders[True])
    index, plan, validation = _data(recipe, stage, inputs)
    _cached(cache, recipe, stage, plan, index, validation)


def _data(
    recipe: Recipe, stage: StageConfig, inputs: Inputs
) -> tuple[ShardIndex, StepPlan, ShardIndex | None]:
    """(training data, its order, validation data)."""
    data = recipe.data
    folder = stage.data or data.train
    index = inputs.indices[folder]
    lengths = inputs.lengths[folder, stage.needs_teacher]
    order = Order(
        index.classes,
        lengths.values,
        lengths.digest,
        seed=recipe.seed if stage.seed is None else stage.seed,
        global_batch=recipe.global_batch(stage),
        window=data.length_window,
    )
    return index, StepPlan(order), inputs.indices[data.validation] if data.validation else None


def _in_loop_scores(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> InLoopScores | None:
    """None where they are off, and in align, where the student stays as it is."""
    log, folder = recipe.log, recipe.data.validation
    if not log.evaluate_every or folder is None or stage.kind == "align":
        return None
    scores = InLoopScores(
        inputs.encoders[False],
        ShardReader(inputs.indices[folder]),
        log.evaluation_samples,
        recipe.micro_batch(stage),
        log.evaluation_tokens,
    )
    scores.refuse()
    return scores


def _teacher_in_words(recipe: Recipe, stage: StageConfig) -> str | None:
    if not stage.needs_teacher or recipe.teacher is None:
        return None
    if recipe.reads_cache(stage):
        return "cache"
    return ", ".join(source.placement for source in recipe.teachers)


def _cached(
    cache: Caches, recipe: Recipe, stage: StageConfig, plan: StepPlan, index: ShardIndex,
    validation: ShardIndex | None,
) -> tuple[PairEncoders, PairEncoders]:  # fmt: skip
    """Encoders of training and validation data that read the teacher's rows, all of them there."""
    samples = _samples_of(stage, plan, index)
    needed = [(index, samples)]
    if validation:
        shown = np.arange(min(recipe.log.validation_samples, len(validation)))
        if validation.fingerprint == index.fingerprint:  # one folder, and one writer in it
            needed = [(index, np.union1d(samples, shown))]
        else:
            needed.append((validation, shown))
    width = teacher_width(recipe)
    cache.fill(needed, width, lambda: load_teacher(recipe))
    reading = [cache.reading(of, width, DTYPES[recipe.precision]) for of, _ in needed]
    return reading[0], reading[-1]


def _samples_of(stage: StageConfig, plan: StepPlan, index: ShardIndex) -> np.ndarray:
    """Numbers of all samples that the stage trains on, each once."""
    epochs = stage.epochs or (stage.steps or 0) / plan.steps_per_epoch
    if epochs >= 1:
        return np.arange(len(index))
    steps = range(math.ceil(epochs * plan.steps_per_epoch))
    slots = np.concatenate([plan.slots(step) for step in steps])
    return np.unique(slots[slots != PADDING])


def _facts(encoders: PairEncoders) -> dict[str, Any]:
    """A collective. Pixels of another backend are other pixels: a run says which it had."""
    peaks = torch.zeros(dist.world_size(), dtype=torch.float64)
    peaks[dist.rank()] = host_memory_gib()
    return {
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "pixels": {side: encoder.pixels for side, encoder in encoders.by_side.items()},
        "host_memory_gib": dist.sum_over_ranks(peaks.to(dist.device())).tolist(),
    }


def _check_logits(vlm: VLM, encoder: ChatEncoder) -> None:
    """See VLM.check; on a few tokens of text, with the weights that train. A collective."""
    turns = [("user", "what is 1 plus 2 ?"), ("assistant", "3")]
    chat = encoder.encode(
        [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns], []
    )
    vlm.check(chat.input_ids_T[None].to(dist.device()))


def _exporter(engine: StudentEngine, source: Path, recipe: Recipe) -> Callable[[Path], None]:
    prefixes = ["recalibrator."]
    if recipe.more_teachers:  # as objectives/several_teachers.py names them
        prefixes = [f"parts.{number}.recalibrator." for number in range(len(recipe.teachers))]

    def write(folder: Path, student: dict[str, Any], recalibrators: list[dict[str, Any]]) -> None:
        write_student(engine.module.student.model, student, source, folder / "student")
        for number, recalibrator in enumerate(recalibrators):
            if recalibrator:
                facts = {
                    "teacher": str(recipe.teachers[number].path),
                    "depth": recipe.recalibrator.depth,
                    "positions": recipe.recalibrator.positions,
                }
                own = recalibrator_folder_of(folder / "recalibrator", number)
                save_recalibrator(recalibrator, own, facts)

    def export(folder: Path) -> None:
        student_state = engine.full_state("student.model.")
        recalibrator_states = [engine.full_state(prefix) for prefix in prefixes]
        scale = engine.module.student.adapter_scale
        if scale is not None:
            student_state = merged(student_state, scale)
        failure = None
        if dist.is_main():
            try:
                write(folder, student_state, recalibrator_states)
            except (OSError, SafetensorError) as error:  # a full disk, most likely
                failure = f"{folder}: {error}; the last checkpoint is whole, start again from it"
        dist.raise_together(failure)

    return export
