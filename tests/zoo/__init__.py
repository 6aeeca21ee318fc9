"""Tiny random-weight models of every family, saved as real Hugging Face folders.

    build(row, folder, kind)    one folder; kind: which of the tokenizers it gets

A row is a family, or a variant of one that takes another way through the code. Each module holds
a few rows; `ROWS` maps a row's name to the function that writes it.
"""

from pathlib import Path

from transformers.utils import is_torchvision_available

from tests.zoo import gemma, idefics, llava, minicpm, ovis, qwen, text, torchvision
from tests.zoo.tokenizers import KINDS, Kind

ROWS = {
    **qwen.ROWS,
    **llava.ROWS,
    **idefics.ROWS,
    **gemma.ROWS,
    **ovis.ROWS,
    **minicpm.ROWS,
    **text.ROWS,
}
if is_torchvision_available():
    ROWS |= torchvision.ROWS
MODEL_TYPES = {
    "internvl_llama": "internvl",
    "internvl_qwen3": "internvl",
    "llava_pixtral": "llava",
    "molmo2_no_bos": "molmo2",
    "paligemma2": "paligemma",
}  # of rows whose name is not their model_type


def build(row: str, folder: Path, kind: Kind = "byte_bpe") -> Path:
    """Write the row's model with a tokenizer of that kind; the folder."""
    ROWS[row](folder, kind)
    return folder


__all__ = ["KINDS", "ROWS", "Kind", "build"]
