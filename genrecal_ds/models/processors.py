"""Loads tokenizers, and image processors on the PIL backend; leaves out video and audio.

transformers builds a processor's video part with torchvision, even to read one picture. This module
leaves the video part out. Pixels always come from the PIL backend, whatever is installed. PIL and
torchvision resize to different pixels, and a run must not depend on which of them is installed.
Families without a PIL backend (Family.needs_torchvision) use torchvision's, or are refused.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from genrecal_ds.errors import UserError
from genrecal_ds.models.families import FAMILIES, family_of, is_known
from genrecal_ds.models.remote import is_allowed
from genrecal_ds.models.tokenizer_files import check_tokenizer, is_plain


class LeftOut:
    """Stands in for a processor's video or audio part: every attribute read from it is None."""

    def __getattr__(self, name: str) -> None:
        return None


class TextProcessor:
    """A tokenizer that is called like a processor; it prepares no pictures."""

    image_token = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: None = None, **options: Any):
        for option in ("return_text_replacement_offsets", "return_mm_token_type_ids"):
            options.pop(option, None)
        return self.tokenizer(text, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


class ExpandingProcessor:
    """Replaces a processor's text path: repeats each picture's placeholder once per picture token.

    Nothing else of the text is changed."""

    def __init__(self, processor: ProcessorMixin):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token = processor.image_token

    def __call__(self, text: list[str], images: list | None = None, **options: Any):
        for option in ("return_text_replacement_offsets", "return_mm_token_type_ids"):
            options.pop(option, None)
        parts = text[0].split(self.image_token)
        replacement = self.image_token * self.processor.image_seq_length
        replaced, start, new_start = [], 0, 0
        for part in parts[:-1]:
            start, new_start = start + len(part), new_start + len(part)
            end, new_end = start + len(self.image_token), new_start + len(replacement)
            spans = {"span": (start, end), "new_span": (new_start, new_end)}
            replaced.append({"text": self.image_token, **spans, "replacement": replacement})
            start, new_start = end, new_end
        encoding = self.tokenizer([replacement.join(parts)], **options)
        encoding["text_replacement_offsets"] = [replaced]
        encoding["token_type_ids"] = encoding["input_ids"] * 0
        if images:
            encoding.update(self.processor.image_processor(images, return_tensors="pt"))
        return encoding

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


def build_processor(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    image_settings: dict[str, Any],
    *,
    processor_class: str | None = None,
    image_processor_type: str | None = None,
    **settings: Any,
) -> ProcessorMixin:
    """Build a family's processor from its parts; image_settings are the image processor's keys.

    The two class names come from a folder's files; default: transformers' own for the family.
    Raises UserError for a family without a processor, or one whose backend is not installed.
    """
    name = processor_class or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(f"model_type {model_type} has no processor in this transformers")
    original = _transformers_class(name, model_type)

    kept = ["image_processor", "tokenizer"]
    left_out = [name for name in original.get_attributes() if name not in kept]

    class PicturesAlone(original):  # type: ignore[misc, valid-type]
        _attributes = original.get_attributes()  # in the order in which its __init__ passes them

        @classmethod
        def get_attributes(cls) -> list[str]:
            return cls._attributes

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if not isinstance(argument, LeftOut):
                return super().check_argument_for_proper_class(name, argument)

    PicturesAlone.__name__ = original.__name__  # the name that save_pretrained writes
    image_processor = _image_processor_class(model_type, image_processor_type)(**image_settings)
    settings |= {name: LeftOut() for name in left_out}
    try:
        processor = PicturesAlone(image_processor=image_processor, tokenizer=tokenizer, **settings)
    except ImportError as error:  # SmolVLM's spells numbers in words, for videos
        raise UserError(f"model_type {model_type}: {' '.join(str(error).split())}") from None
    PicturesAlone._attributes = kept
    for name in left_out:
        delattr(processor, name)
    return processor


def backend(model_type: str) -> str:
    """The backend of a family's pixels: pil, torchvision, or none for a text-only model."""
    family = family_of(model_type)
    if not family.vision_inputs:
        return "none"
    return "torchvision" if family.needs_torchvision else "pil"


def load_processor(folder: str | Path) -> ProcessorMixin | TextProcessor | ExpandingProcessor:
    """Load a folder's processor. Raises UserError naming the folder and the missing file."""
    folder = Path(folder)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    tokenizer = load_tokenizer(folder)
    if is_known(model_type) and not family_of(model_type).vision_inputs:
        return TextProcessor(tokenizer)
    settings = _read(folder / "processor_config.json")
    image_settings = settings.pop("image_processor", None) or _read(
        folder / "preprocessor_config.json"
    )
    if not image_settings:
        raise UserError(f"{folder}: no preprocessor_config.json; copy it from the model's release")
    for key in ("video_processor", "auto_map"):
        settings.pop(key, None)
    named = {
        "processor_class": settings.pop("processor_class", None),
        "image_processor_type": image_settings.pop("image_processor_type", None),
    }
    image_settings.pop("processor_class", None)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
    processor = build_processor(model_type, tokenizer, image_settings, **named, **settings)
    family = FAMILIES.get(model_type)
    if family is not None and family.prefix_lm:
        return ExpandingProcessor(processor)
    return processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError where there is none, or it splits unlike its own file."""
    try:
        if is_plain(folder):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=is_allowed(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{folder}: no tokenizer that loads ({reason}); copy the tokenizer's files from the "
            "model's release"
        ) from None
    check_tokenizer(folder, tokenizer)
    return tokenizer


def _image_processor_class(model_type: str, name: str | None) -> type:
    """The class that the folder names, else transformers' for the family; PIL where it exists."""
    names = dict(IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {}))
    if name:
        stem = name.removesuffix("Fast").removesuffix("Pil")
        candidates = [n for pair in IMAGE_PROCESSOR_MAPPING_NAMES.values() for n in pair.values()]
        if stem in candidates or f"{stem}Pil" in candidates:
            names = {"torchvision": stem, "pil": f"{stem}Pil"}
            if f"{stem}Pil" not in candidates:
                names.pop("pil")
    chosen = names.get("pil") or names.get("torchvision")
    if chosen is None:
        raise UserError(f"model_type {model_type} has no image processor in this transformers")
    return _transformers_class(chosen, model_type)


def _transformers_class(name: str, model_type: str) -> type:
    processor = getattr(importlib.import_module("transformers"), name, None)
    if processor is None:
        raise UserError(f"model_type {model_type}: this transformers has no {name}; update it")
    if "torchvision" not in getattr(processor, "_backends", ()):
        return processor
    # A stand-in. Some stand for classes that need torchvision no more than their file does.
    try:
        return getattr(importlib.import_module(processor.__module__), name)
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision that does not fit torch
        raise UserError(
            f"model_type {model_type}: {name} needs torchvision, which is not installed"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
