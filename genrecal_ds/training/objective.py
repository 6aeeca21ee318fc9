"""Builds a stage's objective: first the parts that its kind asks for, then the objective."""

from importlib import import_module
from pathlib import Path

from genrecal_ds import dist
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.models.head import FrozenHead, load_frozen_head
from genrecal_ds.models.recalibrator import load_recalibrator
from genrecal_ds.models.token_bytes import token_bytes
from genrecal_ds.models.vlm import VLM
from genrecal_ds.objectives.base import Ingredients, Objective
from genrecal_ds.objectives.report import Clock
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.weights import DTYPES, new_recalibrator


def byte_matcher(stage: StageConfig, encoders: PairEncoders) -> ByteMatcher | None:
    """Build what finds shared byte boundaries; None if the kind compares no bytes. Raises UserError
    for a tokenizer with tokens of unknown bytes; see token_bytes."""
    if not stage.facts.matches_bytes:
        return None

    def pieces(encoder: ChatEncoder) -> list[bytes | None]:
        return token_bytes(encoder.tokenizer, encoder.folder)

    return ByteMatcher(pieces(encoders.teacher), pieces(encoders.student))


def build_objective(
    recipe: Recipe,
    stage: StageConfig,
    student: VLM,
    recalibrator_folder: Path | None,
    encoders: PairEncoders,
    clock: Clock,
    matcher: ByteMatcher | None,
) -> Objective:
    """Build the objective of the stage's kind. encoders: both sides' tokenizers and templates.
    Raises UserError for a Recalibrator of another pair."""
    kind, dtype = stage.facts, DTYPES[recipe.precision]
    head = recalibrator = None
    if kind.has_teacher:
        assert recipe.teacher is not None  # a rule of recipe.config.Recipe
        head = FrozenHead(load_frozen_head(recipe.teacher.path, dtype, dist.device()))
        if kind.has_recalibrator:
            recalibrator = new_recalibrator(
                recipe.recalibrator, student, recipe.teacher.path, dtype
            )
            if recalibrator_folder:
                load_recalibrator(recalibrator, recalibrator_folder)
    parts = Ingredients(stage, student, encoders, clock, head, recalibrator, matcher)
    return import_module(kind.objective).build(parts)
