"""Writes a model folder whole or not at all: new weights, and the other files of its source."""

import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

# Weights and config are written anew; everything else of the source folder belongs to it.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")


def write_student(
    model: PreTrainedModel, state: dict[str, Tensor], source: Path, folder: Path
) -> None:
    """Save weights `state` (names of the HF model) with source's tokenizer, processor and template.

    Complete or invisible: written beside, then renamed.
    """
    disable_progress_bar()  # one file a stage: its bar would only tear ours
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    model.save_pretrained(temporary, state_dict=buffers | state)
    # Last, so that no file of the source's is written anew in other words.
    others = shutil.ignore_patterns(*_WEIGHTS, "config.json", ".*")
    shutil.copytree(source, temporary, ignore=others, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
