"""The teacher's frozen head and final norm, read from its folder without building the model.

Replicated on every rank: it is under 2 % of a GPU, and streaming it needs no collective.
"""

from pathlib import Path

import torch
from torch import Tensor

from genrecal_ds.models.loading import Checkpoint
from genrecal_ds.ops.head_loss import Head


def load_frozen_head(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Head:
    """The teacher's head [V, H] as plain tensors; the embedding when the model is tied."""
    checkpoint = Checkpoint(folder)
    embedding = next(
        (name for name in checkpoint.names if name.endswith("embed_tokens.weight")), None
    )
    name = next((name for name in checkpoint.names if name.endswith("lm_head.weight")), embedding)
    if name is None:
        raise ValueError(f"{folder}: neither lm_head.weight nor embed_tokens.weight in its files")
    bias = name.removesuffix("weight") + "bias"
    return Head(
        checkpoint.tensor(name).to(device, dtype),
        checkpoint.tensor(bias).to(device, dtype) if bias in checkpoint.names else None,
    )


def load_final_norm(folder: str | Path) -> Tensor | None:
    """Weight [H] of the language model's final norm, or None when the model has none."""
    checkpoint = Checkpoint(folder)
    suffixes = ("language_model.norm.weight", "text_model.norm.weight", "model.norm.weight")
    for suffix in suffixes:
        for name in checkpoint.names:
            if name.endswith(suffix) and "visual" not in name and "vision" not in name:
                return checkpoint.tensor(name)
    return None
