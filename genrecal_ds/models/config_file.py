"""Reads a folder's config.json, and finds the class of transformers that it is of."""

import json
from pathlib import Path

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from genrecal_ds.errors import UserError
from genrecal_ds.models.families import FAMILIES, family_of, is_known
from genrecal_ds.models.remote import is_allowed


def read_config(folder: str | Path) -> PreTrainedConfig:
    """A folder's transformers config. Raises UserError for an unknown family."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; name a Hugging Face model folder")
    stored = json.loads(path.read_text())
    model_type = stored.get("model_type")
    if not is_known(model_type):
        if "auto_map" in stored:
            raise UserError(
                f"{folder}: model_type {model_type} runs Python code of its own folder; take a "
                "release that transformers knows, or list the files under allow_remote_code"
            )
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{folder}: model_type {model_type} has no adapter; known: {known}")
    return AutoConfig.from_pretrained(folder, trust_remote_code=is_allowed(folder))


def text_width(folder: str | Path) -> int:
    """The hidden size of a folder's language model."""
    width: int = read_config(folder).get_text_config().hidden_size
    return width


def auto_class(config: PreTrainedConfig) -> type:
    """The transformers factory of a family: multimodal or text only; else what its code names."""
    if config.model_type in CONFIG_MAPPING:
        has_eyes = bool(family_of(config.model_type).vision_inputs)
        return AutoModelForMultimodalLM if has_eyes else AutoModelForCausalLM
    factories = (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM)
    return next(f for f in factories if f.__name__ in config.auto_map)
