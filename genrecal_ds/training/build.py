"""Builds the parts that a Trainer runs from a recipe's stage: data, engines, objective, exporter.

Models, data and engines meet only here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.data.features import FeatureWriter
from genrecal_ds.data.loader import PairDataset, PairEncoders
from genrecal_ds.data.plan import StepPlan
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives.report import Clock
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.recipe_file import load_ds_config
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.engine import StudentEngine, Teacher, monitor_config
from genrecal_ds.training.in_loop_scores import InLoopScores
from genrecal_ds.training.inputs import Inputs
from genrecal_ds.training.objective import build_objective, byte_matcher
from genrecal_ds.training.on_policy import OnPolicy
from genrecal_ds.training.progress import host_memory_gib
from genrecal_ds.training.results import exporter
from genrecal_ds.training.stage_data import open_data
from genrecal_ds.training.teacher_cache import TeacherFromCache
from genrecal_ds.training.weights import load_student, load_teacher, refuse_other_architecture


@dataclass
class StageParts:
    """The parts that a Trainer needs, by interface only."""

    dataset: PairDataset
    plan: StepPlan
    validation: PairDataset | None
    student: StudentEngine
    teacher: Teacher | TeacherFromCache | None
    forward_batches: int  # micro-batches of one forward of the teacher
    writer: FeatureWriter | None  # keeps the teacher's rows
    export: Callable[[Path], None]  # a collective: writes the stage's result folders
    answer: Callable[[], dict[str, float]] | None  # a collective: scores of the student's answers
    # a collective: a step's micro-batches with generated answers
    own_answers: Callable[[int, list[PairBatch]], list[PairBatch]] | None
    clock: Clock
    facts: dict[str, Any]  # this start's versions, pixel backend, memory of every rank

    def close(self) -> None:
        self.student.close()
        if self.teacher is not None:
            self.teacher.close()


def build_stage(
    recipe: Recipe, stage: StageConfig, inputs: Inputs, student_folder: Path,
    recalibrator_folder: Path | None,
) -> StageParts:  # fmt: skip
    """Open the stage's data, load weights sharded, build both engines. A collective."""
    clock = Clock()
    encoders = inputs.encoders[stage.facts.has_teacher]
    matcher = byte_matcher(stage, encoders)
    data = open_data(recipe, stage, inputs, matcher)
    scores = _in_loop_scores(recipe, stage, inputs)
    refuse_other_architecture(student_folder, recipe.student.path)
    torch.manual_seed(recipe.seed)  # a fresh Recalibrator is the same on every rank
    student = load_student(student_folder, recipe)
    student.train_only(stage.trained_components)
    objective = build_objective(
        recipe, stage, student, recalibrator_folder, encoders, clock, matcher
    )
    teacher = _teacher(recipe, stage)
    engine = StudentEngine(
        objective,
        load_ds_config(recipe.deepspeed.student),
        recipe.precision,
        recipe.optimizer,
        recipe.accumulation_steps(stage, dist.world_size()),
        monitor_config(recipe.run_dir / stage.name, recipe.log.tensorboard, recipe.log.wandb),
    )
    _check_logits(student, encoders.student)
    if teacher is not None and teacher.module is not None:
        _check_logits(teacher.module.teacher, encoders.teacher)
    own_answers = None
    if stage.on_policy.share:
        on_policy = OnPolicy(data.training, stage.on_policy, recipe.seed)
        own_answers = partial(on_policy, engine.module.student)
    return StageParts(
        dataset=data.training,
        plan=data.plan,
        validation=data.validation,
        student=engine,
        teacher=teacher,
        forward_batches=recipe.teacher.forward_batches if recipe.teacher else 1,
        writer=data.writer,
        export=exporter(engine, student_folder, recipe),
        answer=None if scores is None else (lambda: scores(engine.module.student)),
        own_answers=own_answers,
        clock=clock,
        facts={**_facts(encoders), "teacher": _teacher_in_words(recipe, stage)},
    )


def _teacher(recipe: Recipe, stage: StageConfig) -> Teacher | TeacherFromCache | None:
    if not stage.facts.has_teacher:
        return None
    return TeacherFromCache() if recipe.reads_cache(stage) else load_teacher(recipe)


def _teacher_in_words(recipe: Recipe, stage: StageConfig) -> str | None:
    if not stage.facts.has_teacher or recipe.teacher is None:
        return None
    return "cache" if recipe.reads_cache(stage) else recipe.teacher.placement


def _in_loop_scores(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> InLoopScores | None:
    """Build the scores; None if they are off or the student does not train."""
    log, folder = recipe.log, recipe.data.validation
    if not log.evaluate_every or folder is None or not stage.facts.trains_student:
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


def _facts(encoders: PairEncoders) -> dict[str, Any]:
    """Collect a run's facts; a collective. Another pixel backend gives other pixels, so name it."""
    peaks = torch.zeros(dist.world_size(), dtype=torch.float64)
    peaks[dist.rank()] = host_memory_gib()
    return {
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "pixels": {side: encoder.pixels for side, encoder in encoders.by_side.items()},
        "host_memory_gib": dist.sum_over_ranks(peaks.to(dist.device())).tolist(),
    }


def _check_logits(vlm: VLM, encoder: ChatEncoder) -> None:
    """Run VLM.check on a few tokens of text, with the weights that train. A collective."""
    turns = [("user", "what is 1 plus 2 ?"), ("assistant", "3")]
    chat = encoder.encode(
        [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns], []
    )
    vlm.check(chat.input_ids_T[None].to(dist.device()))
