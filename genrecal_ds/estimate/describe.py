"""Says what a stage trains and how large it is, on the meta device: no weights, no memory."""

from collections.abc import Iterator

import torch

from genrecal_ds.models.config_file import read_config, text_width
from genrecal_ds.models.lora import add_adapters
from genrecal_ds.models.recalibrator import blocks_of, choose_blocks, unfilled
from genrecal_ds.models.vlm import VLM
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.stage_config import StageConfig


def describe_blocks(recipe: Recipe) -> str:
    """Name the Recalibrator's blocks and attention. Raises UserError if they cannot run."""
    text_config = read_config(recipe.student.path).get_text_config()
    choice, family = recipe.recalibrator, blocks_of(text_config.model_type)
    attention = choose_blocks(family, choice.blocks, choice.attention)
    if attention is None:
        return f"transformers' own {family} blocks, sequences padded"
    return f"packed {family} blocks, attention {attention}"


def describe(recipe: Recipe, stage: StageConfig) -> Iterator[tuple[str, int, int]]:
    """Yield (part, parameters, how many of them train) of a stage, on the meta device: needs no
    memory and no weights."""
    with torch.device("meta"):
        student = VLM.from_config(recipe.student.path, torch.float32)
        if recipe.student.lora:
            add_adapters(student, recipe.student.lora)
        student.train_only(stage.trained_components)
        counts: dict[str, list[int]] = {}
        for _, parameter, component in student.components():
            total, trained = counts.setdefault(component, [0, 0])
            counts[component] = [
                total + parameter.numel(),
                trained + parameter.numel() * parameter.requires_grad,
            ]
        for component, (total, trained) in counts.items():
            yield f"student.{component}", total, trained
        if stage.facts.has_recalibrator or stage.facts.projects:
            assert recipe.teacher is not None  # a rule of config.Recipe
            text_config, width = student.text_config, text_width(recipe.teacher.path)
            if stage.facts.has_recalibrator:
                recalibrator = unfilled(recipe.recalibrator, text_config, width)
                total = sum(parameter.numel() for parameter in recalibrator.parameters())
                yield "recalibrator", total, total
            if stage.facts.projects:
                total = text_config.hidden_size * width
                yield "projection", total, total


def freeze_map(recipe: Recipe, stage: StageConfig) -> Iterator[str]:
    """Yield what `describe` gives as lines for people."""
    yield f"stage {stage.name} ({stage.kind})"
    for part, count, trained in describe(recipe, stage):
        word = {count: "trains", 0: "frozen"}.get(trained, f"{trained:,} train: adapters")
        yield f"  {part:<20} {count:>15,} parameters  {word}"
