"""Processors without torchvision: the PIL image backend, the tokenizer, and no video part.

transformers builds a processor's video part with torchvision, even to read one picture. Here the
part is left out. Pixels always come from the PIL backend, whatever is installed: PIL and
torchvision resize to different pixels, and a run must not depend on which one is there.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, ProcessorMixin

from genrecal_ds.errors import UserError

# model_type -> (module, processor class, module, PIL image processor class)
_CLASSES = {
    "qwen2_vl": (
        "qwen2_vl.processing_qwen2_vl", "Qwen2VLProcessor",
        "qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil",
    ),
    "internvl": (
        "internvl.processing_internvl", "InternVLProcessor",
        "got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil",
    ),
    "idefics3": (
        "idefics3.processing_idefics3", "Idefics3Processor",
        "idefics3.image_processing_pil_idefics3", "Idefics3ImageProcessorPil",
    ),
}  # fmt: skip


def _find(module: str, name: str) -> type:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def build_processor(
    model_type: str, tokenizer: Any, image_settings: dict[str, Any], **settings: Any
) -> ProcessorMixin:
    """A family's processor from its parts; image_settings are the image processor's own keys.

    Raises UserError for a family without an entry.
    """
    if model_type not in _CLASSES:
        known = ", ".join(sorted(_CLASSES))
        raise UserError(f"model_type {model_type} has no processor entry; known: {known}")
    processor_module, processor_name, image_module, image_name = _CLASSES[model_type]
    original = _find(processor_module, processor_name)

    class WithoutVideo(original):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    WithoutVideo.__name__ = processor_name  # the name that save_pretrained writes
    image_processor = _find(image_module, image_name)(**image_settings)
    return WithoutVideo(image_processor=image_processor, tokenizer=tokenizer, **settings)


def load_processor(folder: str | Path) -> ProcessorMixin:
    """The processor of a model folder. Raises UserError naming the folder and the missing file."""
    folder = Path(folder)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    settings = _read(folder / "processor_config.json")
    image_settings = settings.pop("image_processor", None) or _read(
        folder / "preprocessor_config.json"
    )
    if not image_settings:
        raise UserError(f"{folder}: no preprocessor_config.json; copy it from the model's release")
    for key in ("processor_class", "video_processor", "auto_map"):
        settings.pop(key, None)
    image_settings.pop("image_processor_type", None)
    image_settings.pop("processor_class", None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text()
    return build_processor(model_type, tokenizer, image_settings, **settings)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
