"""Reads the teacher's frozen head from its folder, whole on every rank, without the model.

The gradient of the rows is formed in the forward, so backward needs nothing of the head, and no
optimizer, checkpoint or ZeRO partition ever sees it.

Shapes: K passes, N loss rows, n some rows, H teacher width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from genrecal_ds.models.config_file import read_config
from genrecal_ds.models.derived import adds_one
from genrecal_ds.models.language_head import logit_transform
from genrecal_ds.models.loading import find_sources
from genrecal_ds.models.tensor_files import Checkpoint, Source
from genrecal_ds.models.vlm import skeleton
from genrecal_ds.ops.gemm import project_, wide
from genrecal_ds.ops.head_loss import Head, HeadLoss, head_loss
from genrecal_ds.ops.softcap import softcapped


class FrozenHead:
    """What an objective sees of the teacher's head."""

    def __init__(self, head: Head):
        self.head = head

    def loss(
        self,
        rows_KNH: Tensor,
        teacher_rows_NH: Tensor,
        labels_N: Tensor,
        ce_weights: Sequence[float],
        kl_weights: Sequence[float],
    ) -> HeadLoss:
        """See ops/head_loss."""
        return head_loss(rows_KNH, teacher_rows_NH, labels_N, self.head, ce_weights, kl_weights)

    @torch.no_grad()
    def logits(self, rows_nH: Tensor) -> Tensor:
        """[n, V] in fp32; for a few rows at a time, and for baselines."""
        weight, bias, scale, softcap = self.head
        out_nV = rows_nH.new_empty(len(rows_nH), len(weight), dtype=wide(rows_nH))
        project_(out_nV, rows_nH, weight)
        out_nV = out_nV if bias is None else out_nV + bias
        out_nV = out_nV * scale
        return softcapped(out_nV, softcap)


def load_frozen_head(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Head:
    """The teacher's head [V, H] as plain tensors; the embedding when the model is tied."""
    weight, bias = _sources(folder)
    return Head(
        weight.tensor().to(device, dtype),
        None if bias is None else bias.tensor().to(device, dtype),
        *logit_transform(read_config(folder)),
    )


def load_final_norm(folder: str | Path) -> Tensor | None:
    """What [H] the language model's final norm multiplies by, or None when it has no weight."""
    vlm = skeleton(folder)
    sources = find_sources(vlm.model, Checkpoint(folder))
    for name, _, component in vlm.components():
        if component == "norm" and name.endswith(".weight"):
            own = name.removeprefix("model.")
            weight = sources[own].tensor()
            norm = vlm.model.get_submodule(own.removesuffix(".weight"))
            return weight + 1 if adds_one(norm, len(weight)) else weight
    return None


def _sources(folder: str | Path) -> tuple[Source, Source | None]:
    """The head's weight and bias in the files; the embedding where it is tied."""
    vlm = skeleton(folder)
    sources = find_sources(vlm.model, Checkpoint(folder))
    named = dict(vlm.model.named_parameters(remove_duplicate=False))
    weight = next(name for name, parameter in named.items() if parameter is vlm.head.weight)
    bias = next((name for name, parameter in named.items() if parameter is vlm.head.bias), None)
    return sources[weight], None if bias is None else sources[bias]
