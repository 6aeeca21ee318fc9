"""Reads the sizes for memory.py from a recipe's folders. Needs no weights and no GPU."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from genrecal_ds.estimate.describe import describe
from genrecal_ds.estimate.memory import Decoder, Load, Model, Zero
from genrecal_ds.models.derived import blocks_in, inner_width, num_heads
from genrecal_ds.models.lora import add_adapters
from genrecal_ds.models.recalibrator import choose_blocks
from genrecal_ds.models.vlm import VLM, skeleton
from genrecal_ds.recipe.config import ModelSource, Recipe
from genrecal_ds.recipe.recipe_file import load_ds_config
from genrecal_ds.recipe.stage_config import StageConfig


def load_of(recipe: Recipe, stage: StageConfig, gpus: int, per_host: int) -> Load:
    """Return a stage's load on one of `gpus` ranks. Raises UserError where training would."""
    student = skeleton(recipe.student.path)
    if recipe.student.lora:
        with torch.device("meta"):
            add_adapters(student, recipe.student.lora)
    student.train_only(stage.trained_components)
    zero = Zero.of(load_ds_config(recipe.deepspeed.student))
    parts = {part: count for part, count, _ in describe(recipe, stage)}
    beside = parts.get("recalibrator", 0) or parts.get("projection", 0)
    load = Load(
        gpus=gpus,
        per_host=per_host,
        width=2 if recipe.precision == "bf16" else 4,
        micro_batch=recipe.micro_batch(stage),
        kind=stage.facts,
        student=model_of(student, zero.keeps_whole),
        student_zero=zero,
        student_tokens=recipe.student.max_length,
        trained=beside + sum(p.numel() for p in student.parameters() if p.requires_grad),
        trains_student=bool(stage.trained_components),
        trains_head=student.head.weight.requires_grad,
        ce_trains=stage.losses.student_ce > 0,
        checkpointing=recipe.student.gradient_checkpointing,
        recalibrator=beside,
    )
    return _beside_teacher(load, recipe, stage, student) if stage.facts.has_teacher else load


def _beside_teacher(load: Load, recipe: Recipe, stage: StageConfig, student: VLM) -> Load:
    assert recipe.teacher is not None  # a rule of config.Recipe
    zero = Zero.of(load_ds_config(recipe.teacher_ds_config))
    # Rounded: an estimate is useful even if the batch does not divide yet.
    micro_steps = max(1, recipe.global_batch(stage) // (load.micro_batch * load.gpus))
    chosen, family = recipe.recalibrator, student.text_config.model_type
    return replace(
        load,
        teacher=model_of(skeleton(recipe.teacher.path), zero.keeps_whole),
        teacher_zero=zero,
        teacher_tokens=recipe.teacher.max_length,
        placement="cache" if recipe.reads_cache(stage) else recipe.teacher.placement,
        teacher_batches=min(recipe.teacher.forward_batches, micro_steps),
        depth=chosen.depth if stage.facts.has_recalibrator else 0,
        packed_recalibrator=choose_blocks(family, chosen.blocks, chosen.attention) is not None,
        has_regular=stage.has_regular,
    )


def model_of(vlm: VLM, keeps_whole: int) -> Model:
    """Measure a model. keeps_whole: ZeRO-3 shards no tensor of at most so many numbers."""
    text = vlm.text_config
    heads = num_heads(text)
    decoder = Decoder(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=inner_width(text),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )
    numbers = [parameter.numel() for parameter in vlm.parameters()]
    own = (sum(p.numel() for p in m.parameters(recurse=False)) for m in vlm.modules())
    layers = blocks_in(vlm.model.get_decoder()).modules()
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
    """Return how many patches a family joins into one visual token; configs name it differently."""
    vision = getattr(config, "vision_config", None)
    if merge := getattr(vision, "spatial_merge_size", None):
        return merge**2
    if ratio := getattr(config, "downsample_ratio", None):
        return round(1 / ratio**2)
    return (getattr(config, "scale_factor", None) or 1) ** 2


def body_of(source: ModelSource) -> VLM:
    """Build a folder's architecture on the meta device, with the recipe's packing and attention."""
    with torch.device("meta"):
        return VLM.from_config(source.path, torch.float32, source.pack, source.attention)
