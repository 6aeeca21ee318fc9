"""What memory.py calculates with, taken from a recipe's folders. Needs no weights and no GPU."""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from genrecal_ds.estimate.describe import describe
from genrecal_ds.estimate.memory import Decoder, Load, Model, Zero
from genrecal_ds.models.lora import add_adapters
from genrecal_ds.models.recalibrator import choose_blocks
from genrecal_ds.models.vlm import VLM, skeleton
from genrecal_ds.objectives import mot
from genrecal_ds.ops.linear_distance import MATRICES
from genrecal_ds.ops.next_byte import BYTE_MATRICES
from genrecal_ds.recipe.config import ModelSource, Recipe
from genrecal_ds.recipe.recipe_file import load_ds_config
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.stages import freeze, trained_components


def load_of(recipe: Recipe, stage: StageConfig, gpus: int, per_host: int) -> Load:
    """A stage's memory on one of so many ranks. Raises UserError as training would."""
    student = skeleton(recipe.student.path)
    if recipe.student.lora:
        with torch.device("meta"):
            add_adapters(student, recipe.student.lora)
    freeze(student, stage)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    zero = Zero.of(load_ds_config(recipe.deepspeed.student))
    shared = {
        "gpus": gpus,
        "per_host": per_host,
        "width": 2 if recipe.precision == "bf16" else 4,
        "micro_batch": recipe.micro_batch(stage),
        "student": model_of(student, zero.keeps_whole),
        "student_zero": zero,
        "student_tokens": recipe.student.max_length,
        "trains_student": bool(trained_components(stage)),
        "trains_head": student.head.weight.requires_grad,
        "student_ce": _student_ce(stage),
        "checkpointing": recipe.student.gradient_checkpointing,
    }
    if not stage.needs_teacher:
        return Load(**shared, trained=trained)
    assert recipe.teacher is not None  # a rule of config.Recipe
    parts = {part: count for part, count, _ in describe(recipe, stage)}
    recalibrator = parts.get("recalibrator", 0) or parts.get("projection", 0)
    zero = Zero.of(load_ds_config(recipe.teacher_ds_config))
    # Rounded: an estimate is of use also where the batch does not divide yet.
    micro_steps = max(1, recipe.global_batch(stage) // (recipe.micro_batch(stage) * gpus))
    has_regular = stage.kind == "align" and stage.losses.regularizer != "none"
    rows = stage.answers.rows
    distance, matrices = _distance(stage)
    chosen = recipe.recalibrator
    family = student.text_config.model_type
    return Load(
        **shared,
        trained=trained + recalibrator,
        teacher=model_of(skeleton(recipe.teacher.path), zero.keeps_whole),
        teacher_zero=zero,
        teacher_tokens=recipe.teacher.max_length,
        placement="cache" if recipe.reads_cache(stage) else recipe.teacher.placement,
        teacher_batches=min(recipe.teacher.forward_batches, micro_steps),
        distance=distance,
        distance_matrices=matrices,
        recalibrator=recalibrator,
        depth=chosen.depth if stage.has_recalibrator else 0,
        packed_recalibrator=choose_blocks(family, chosen.blocks, chosen.attention) is not None,
        passes=1 + (rows == "both") + has_regular,
        has_regular=has_regular,
        # The pass with the student's own answer rows has labels of its own.
        head_calls=(rows != "teacher") + (rows != "student" or has_regular),
    )


def _student_ce(stage: StageConfig) -> Literal["none", "measured", "trains"]:
    """As the objectives do: align has no such term, a baseline of weight 0 still logs it."""
    if stage.kind != "align" and stage.losses.student_ce > 0:
        return "trains"
    return "none" if stage.has_recalibrator else "measured"


def _distance(
    stage: StageConfig,
) -> tuple[Literal["none", "chunks", "conversations", "projected"], int]:
    """(where it is computed, matrices that it holds there)."""
    if stage.kind == "dskd":
        return "projected", 0
    if stage.kind == "mot":
        return "conversations", mot.MATRICES
    matrices = BYTE_MATRICES if stage.kind == "byte_kd" else MATRICES
    return ("chunks", matrices) if stage.needs_logits else ("none", 0)


def model_of(vlm: VLM, keeps_whole: int) -> Model:
    """keeps_whole: ZeRO-3 shards no tensor of at most so many numbers."""
    text = vlm.text_config
    heads = text.num_attention_heads
    decoder = Decoder(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )
    numbers = [parameter.numel() for parameter in vlm.parameters()]
    own = (sum(p.numel() for p in m.parameters(recurse=False)) for m in vlm.modules())
    layers = [module for layer in vlm.model.get_decoder().layers for module in layer.modules()]
    matrices = [module.weight.numel() for module in layers if isinstance(module, nn.Linear)]
    vision = [p.numel() for _, p, part in vlm.components() if part == "vision"]
    return Model(
        decoder=decoder,
        vocab=vlm.head.out_features,
        total=sum(numbers),
        gathered=max(own),
        small=sum(n for n in numbers if n <= keeps_whole),
        matrices=sum(matrices),
        largest_matrix=max(matrices, default=0),
        largest_tensor=max(numbers),
        body=sum(numbers) - (0 if vlm.is_tied else vlm.head.weight.numel()),
        tensors=sum(n > keeps_whole for n in numbers),
        vision=sum(vision),
        patches=_patches_of_a_token(vlm.model.config),
    )


def _patches_of_a_token(config: PreTrainedConfig) -> int:
    """How many patches a family joins into one visual token, by the names they give it."""
    vision = getattr(config, "vision_config", None)
    if merge := getattr(vision, "spatial_merge_size", None):
        return merge**2
    if ratio := getattr(config, "downsample_ratio", None):
        return round(1 / ratio**2)
    return (getattr(config, "scale_factor", None) or 1) ** 2


def body_of(source: ModelSource) -> VLM:
    """A folder's architecture on the meta device, as the recipe wants it to run."""
    with torch.device("meta"):
        return VLM.from_config(source.path, torch.float32, source.pack, source.attention)
