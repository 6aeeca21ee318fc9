"""Loads both models and the Recalibrator for a stage: sharded or whole, filled or fresh."""

from pathlib import Path

import torch

from genrecal_ds import dist
from genrecal_ds.errors import UserError
from genrecal_ds.models.attention import check_backend
from genrecal_ds.models.config_file import text_width
from genrecal_ds.models.head import load_final_norm
from genrecal_ds.models.loading import find_sources, load_buffers
from genrecal_ds.models.lora import add_adapters
from genrecal_ds.models.recalibrator import Recalibrator, unfilled
from genrecal_ds.models.replica import load_replica
from genrecal_ds.models.tensor_files import Checkpoint
from genrecal_ds.models.vlm import VLM, TeacherBody, skeleton
from genrecal_ds.recipe.config import ModelSource, RecalibratorConfig, Recipe
from genrecal_ds.recipe.recipe_file import load_ds_config
from genrecal_ds.training.engine import (
    Teacher,
    TeacherEngine,
    TeacherReplica,
    build_sharded,
    load_sharded,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def refuse_other_architecture(folder: str | Path, own: Path) -> None:
    """Raise UserError for a folder that does not fit the recipe's tokenizer and processor."""
    shapes, own_shapes = (
        {name: parameter.shape for name, parameter in skeleton(path).named_parameters()}
        for path in (folder, own)
    )
    if shapes != own_shapes:
        raise UserError(
            f"{folder} is of another architecture than student.path, whose tokens it would be "
            "taught; name a result of this student"
        )


def load_student(folder: Path, recipe: Recipe) -> VLM:
    """Load the whole student, sharded."""
    student = load_vlm_sharded(folder, recipe.deepspeed.student, recipe.precision, recipe.student)
    if recipe.student.lora:
        add_adapters(student, recipe.student.lora)
    if recipe.student.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def load_teacher(recipe: Recipe) -> Teacher:
    """Load the teacher's frozen body: sharded in an engine of its own, or whole on every rank."""
    source = recipe.teacher
    assert source is not None  # a rule of recipe.config.Recipe
    if source.is_sharded:
        name = recipe.teacher_ds_config
        group = dist.host_group() if source.placement == "zero3_host" else None
        vlm = load_vlm_sharded(source.path, name, recipe.precision, source, group)
        return TeacherEngine(TeacherBody(vlm), load_ds_config(name), recipe.precision)
    vlm = load_replica(
        source.path, DTYPES[recipe.precision], dist.device(),
        source.placement == "replica_int8", source.pack, source.attention,
    )  # fmt: skip
    if source.compile:
        vlm.compile_blocks()
    return TeacherReplica(TeacherBody(vlm))


def load_vlm_sharded(
    folder: str | Path,
    ds_name: str,
    precision: str,
    source: ModelSource | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> VLM:
    """Load a whole VLM from its folder; each rank holds, and reads, only its own share.

    source: the recipe's packing and attention; the folder may be another stage's result.
    group: the ranks that share the model; default all.
    """
    options = (source.pack, source.attention) if source else ()
    vlm = build_sharded(
        lambda: VLM.from_config(folder, DTYPES[precision], *options),
        load_ds_config(ds_name),
        precision,
        group,
    )
    sources = find_sources(skeleton(folder).model, Checkpoint(folder))
    load_sharded(
        (parameter, sources[name].flat_range) for name, parameter in vlm.model.named_parameters()
    )
    load_buffers(vlm.model, sources)
    return vlm


def new_recalibrator(
    config: RecalibratorConfig, student: VLM, teacher: Path, dtype: torch.dtype
) -> Recalibrator:
    """Build a fresh, whole Recalibrator, which the engine shards. teacher: the teacher's folder."""
    recalibrator = unfilled(config, student.text_config, text_width(teacher), dtype)
    check_backend(config.attention, dist.device(), dtype)
    std = getattr(student.text_config, "initializer_range", 0.02)
    recalibrator.initialize(std, load_final_norm(teacher))
    return recalibrator
