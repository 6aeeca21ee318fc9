"""The teacher's frozen head, read from its folder without building the model, and where it lies.

    replicated       whole on every rank: under 2 % of a GPU, and no collective. The default
    gathered         a share per rank; whole for the length of one call (all-gather of V H)
    vocab_parallel   a share per rank, never whole; rows travel instead (ops/head_loss)

The gradient of the rows is formed in the forward, so no placement gathers anything in backward,
and no optimizer, checkpoint or ZeRO partition ever sees the head.

Shapes: K passes, N loss rows, H teacher width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from genrecal_ds import dist
from genrecal_ds.errors import UserError
from genrecal_ds.models.loading import Checkpoint, Source, find_sources
from genrecal_ds.models.vlm import logit_transform, read_config, skeleton
from genrecal_ds.ops.gemm import project_, wide
from genrecal_ds.ops.head_loss import Head, HeadLoss, head_loss
from genrecal_ds.ops.head_loss.vocab_parallel import all_gather, head_loss_vocab_parallel

Placement = Literal["replicated", "gathered", "vocab_parallel"]


class FrozenHead(Protocol):
    """What an objective sees of the teacher's head."""

    def loss(
        self,
        rows_KNH: Tensor,
        teacher_rows_NH: Tensor,
        labels_N: Tensor,
        ce_weights: Sequence[float],
        kl_weights: Sequence[float],
    ) -> HeadLoss:
        """head_loss of this rank's rows; a collective call unless the head is replicated."""
        ...


class ReplicatedHead:
    def __init__(self, head: Head):
        self.head = head

    def loss(self, rows_KNH, teacher_rows_NH, labels_N, ce_weights, kl_weights) -> HeadLoss:
        return head_loss(rows_KNH, teacher_rows_NH, labels_N, self.head, ce_weights, kl_weights)

    @torch.no_grad()
    def logits(self, rows_nH: Tensor) -> Tensor:
        """[n, V] in fp32; for a few rows at a time, and for baselines."""
        weight, bias, scale, softcap, _ = self.head
        out_nV = rows_nH.new_empty(len(rows_nH), len(weight), dtype=wide(rows_nH))
        project_(out_nV, rows_nH, weight)
        out_nV = out_nV if bias is None else out_nV + bias
        out_nV = out_nV * scale
        return out_nV if softcap is None else softcap * torch.tanh(out_nV / softcap)


class GatheredHead:
    """Equal shares of whole rows, the last padded with zeros that count in no softmax."""

    def __init__(self, share: Head, vocabulary: int):
        self.share, self.vocabulary = share, vocabulary

    def loss(self, rows_KNH, teacher_rows_NH, labels_N, ce_weights, kl_weights) -> HeadLoss:
        head = self.share._replace(
            weight_VH=_gather(self.share.weight_VH),
            bias_V=None if self.share.bias_V is None else _gather(self.share.bias_V),
            valid_vocab=self.vocabulary,
        )
        return head_loss(rows_KNH, teacher_rows_NH, labels_N, head, ce_weights, kl_weights)


class VocabParallelHead:
    def __init__(self, share: Head, first_column: int):
        self.share, self.first_column = share, first_column

    def loss(self, rows_KNH, teacher_rows_NH, labels_N, ce_weights, kl_weights) -> HeadLoss:
        return head_loss_vocab_parallel(
            rows_KNH, teacher_rows_NH, labels_N, self.share, self.first_column,
            ce_weights, kl_weights,
        )  # fmt: skip


def place_frozen_head(
    folder: str | Path, dtype: torch.dtype, device: torch.device, placement: Placement
) -> FrozenHead:
    """The teacher's head where the recipe wants it; a rank reads only the rows it keeps."""
    if placement == "replicated" or dist.world_size() == 1:
        return ReplicatedHead(load_frozen_head(folder, dtype, device))
    weight, bias = _sources(folder)
    vocabulary, width = weight.shape
    ranks, rank = dist.world_size(), dist.rank()
    if vocabulary < ranks:
        raise UserError(f"teacher_head: {placement} over {ranks} ranks, {vocabulary} columns")
    share = -(-vocabulary // ranks)
    first, last = rank * share, (rank + 1) * share
    if placement == "vocab_parallel":  # as equal as whole columns allow, and none without any
        first, last = rank * vocabulary // ranks, (rank + 1) * vocabulary // ranks

    def rows(source: Source, size: int) -> Tensor:
        start, stop = min(first, vocabulary), min(last, vocabulary)
        read = source.flat_range(start * size, stop * size).to(device, dtype)
        return torch.cat([read, read.new_zeros((last - first) * size - len(read))])

    head = Head(
        rows(weight, width).view(last - first, width),
        None if bias is None else rows(bias, 1),
        *logit_transform(read_config(folder)),
    )
    if placement == "gathered":
        return GatheredHead(head, vocabulary)
    return VocabParallelHead(head, first)


def load_frozen_head(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Head:
    """The teacher's head [V, H] as plain tensors; the embedding when the model is tied."""
    weight, bias = _sources(folder)
    return Head(
        weight.tensor().to(device, dtype),
        None if bias is None else bias.tensor().to(device, dtype),
        *logit_transform(read_config(folder)),
    )


def load_embedding(folder: str | Path, dtype: torch.dtype) -> Tensor:
    """The language model's input embedding [V, H], in host memory."""
    vlm = skeleton(folder)
    weight = vlm.model.get_input_embeddings().weight
    named = vlm.model.named_parameters(remove_duplicate=False)
    name = next(name for name, parameter in named if parameter is weight)
    return find_sources(vlm.model, Checkpoint(folder))[name].tensor().to(dtype)


def load_final_norm(folder: str | Path) -> Tensor | None:
    """What [H] the language model's final norm multiplies by, or None when it has no weight."""
    vlm = skeleton(folder)
    sources = find_sources(vlm.model, Checkpoint(folder))
    for name, _, component in vlm.components():
        if component == "norm" and name.endswith(".weight"):
            weight = sources[name.removeprefix("model.")].tensor()
            return weight + 1 if vlm.family.norm_adds_one else weight
    return None


def _sources(folder: str | Path) -> tuple[Source, Source | None]:
    """The head's weight and bias in the files; the embedding where it is tied."""
    vlm = skeleton(folder)
    sources = find_sources(vlm.model, Checkpoint(folder))
    named = dict(vlm.model.named_parameters(remove_duplicate=False))
    weight = next(name for name, parameter in named.items() if parameter is vlm.head.weight)
    bias = next((name for name, parameter in named.items() if parameter is vlm.head.bias), None)
    return sources[weight], None if bias is None else sources[bias]


def _gather(share: Tensor) -> Tensor:
    whole = share.new_empty(dist.world_size() * share.shape[0], *share.shape[1:])
    all_gather(whole, share)
    return whole
