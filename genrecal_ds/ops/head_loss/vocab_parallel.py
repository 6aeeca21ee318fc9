"""head_loss with the head's rows divided over ranks: each sees all rows, and its own columns.

Shapes: W ranks, K passes, N loss rows of the longest rank, n rows of a chunk, H teacher width,
v vocabulary columns of this rank.

Received per rank: (W - 1) (K + 1) N H for rows and teacher rows, (W - 1) K N H for the reduced
gradient, and a few numbers a row; no logits and no weights. Cheaper than gathering a head once
while N < V / (3 W) (docs/performance.md). Every rank calls it as often as the others, with any
number of rows, none included: shorter ranks are padded with rows that count nothing.
"""

from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

from genrecal_ds.ops import IGNORE
from genrecal_ds.ops.gemm import project_, wide
from genrecal_ds.ops.head_loss.chunked import chunk_size, sum_up
from genrecal_ds.ops.head_loss.contract import FORWARD_KL, Head, HeadLoss, check
from genrecal_ds.ops.head_loss.epilogue import transform_

# The older name warns where the newer one exists.
all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor


def head_loss_vocab_parallel(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    shard: Head,
    first_column: int,
    ce_weights: Sequence[float],
    kl_weights: Sequence[float],
    group: torch_dist.ProcessGroup | None = None,
) -> HeadLoss:
    """head_loss of this rank's rows; shard holds columns first_column.. of the whole head.

    Equals head_loss over the whole head, forward KL at temperature 1. Waits for the device once,
    for the longest rank's number of rows. A label that no rank holds gives a NaN loss. Raises
    ValueError naming the argument that does not fit.
    """
    check(
        rows_KNH, teacher_rows_NH, labels_N, shard, ce_weights, kl_weights, FORWARD_KL, 1.0,
        labels_are_columns=False,
    )  # fmt: skip
    if shard.valid_vocab is not None:
        raise ValueError("head.valid_vocab: a share has no padding; leave the columns out of it")
    loss_sum, ce_KN, kl_KN, top1_KN = _VocabParallel.apply(
        rows_KNH, teacher_rows_NH, labels_N, shard, first_column, ce_weights, kl_weights, group
    )
    return HeadLoss(loss_sum, ce_KN, kl_KN, top1_KN)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows_KNH, teacher_rows_NH, labels_N, shard, first_column, ce_weights, kl_weights, group
    ):
        passes, num_rows, width = rows_KNH.shape
        needs_grad, weight = ctx.needs_input_grad[0], shard.weight_VH
        ranks, rank = torch_dist.get_world_size(group), torch_dist.get_rank(group)
        # Ranks must cut the same chunks: each has collectives of its own.
        longest, widest = _largest((num_rows, weight.shape[0]), weight.device, group)
        stacked_WMNH, labels_WN = _gather_rows(
            rows_KNH, teacher_rows_NH, labels_N, longest, ranks, group
        )
        fp = wide(weight)
        valid_WN = labels_WN != IGNORE
        a_K1 = torch.tensor(ce_weights, dtype=fp, device=weight.device).unsqueeze(-1)
        b_K1 = torch.tensor(kl_weights, dtype=fp, device=weight.device).unsqueeze(-1)
        losses = rows_KNH.new_zeros(2, passes, ranks, longest, dtype=fp)
        top1 = torch.zeros(passes, ranks, longest, dtype=torch.bool, device=weight.device)
        grad_WKNH = rows_KNH.new_zeros(ranks, passes, longest, width) if needs_grad else None
        size = chunk_size(longest, passes, True, weight, widest)
        for owner in range(ranks):
            for start in range(0, longest, size):
                part = slice(start, start + size)
                chunk = _Chunk(stacked_WMNH[owner, :, part], labels_WN[owner, part], shard)
                chunk.reduce(first_column, group)
                losses[:, :, owner, part], top1[:, owner, part] = chunk.losses(), chunk.top1
                if grad_WKNH is not None:
                    weights_n = valid_WN[owner, part].to(fp)
                    d_KnV = chunk.dlogits_(a_K1, b_K1, weights_n, first_column)
                    d = d_KnV.flatten(0, 1).to(weight.dtype) @ weight
                    grad_WKNH[owner, :, part] = d.view(passes, -1, width)
        own, valid_N = slice(0, num_rows), labels_N != IGNORE
        loss_sum, ce_KN, kl_KN = sum_up(
            losses[0, :, rank, own], losses[1, :, rank, own], valid_N, ce_weights, kl_weights
        )
        top1_KN = top1[:, rank, own] & valid_N
        if grad_WKNH is not None:
            summed_KNH = grad_WKNH.new_empty(passes, longest, width)
            torch_dist.reduce_scatter_tensor(summed_KNH, grad_WKNH.flatten(0, 1), group=group)
            ctx.save_for_backward(summed_KNH[:, own])
        ctx.mark_non_differentiable(ce_KN, kl_KN, top1_KN)
        return loss_sum, ce_KN, kl_KN, top1_KN

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        (grad_KNH,) = ctx.saved_tensors
        return ((grad_KNH * grad_loss).to(grad_KNH.dtype), *[None] * 7)


class _Chunk:
    """Some rows of one rank through this rank's columns. M = K + 1 matrices: passes, teacher.

    The softmaxes' maxima, then their sums, meet in two small collectives; everything else about
    a row follows from those on every rank alike.
    """

    def __init__(self, rows_MnH: Tensor, labels_n: Tensor, shard: Head):
        matrices, num_rows, width = rows_MnH.shape
        vocabulary = shard.weight_VH.shape[0]
        flat = rows_MnH.new_empty(matrices * num_rows, vocabulary, dtype=wide(shard.weight_VH))
        project_(flat, rows_MnH.reshape(-1, width), shard.weight_VH)
        self.slope = transform_(flat, shard, needs_slope=True)
        self.logits_MnV = flat.view(matrices, num_rows, vocabulary)
        self.labels_n, self.scale = labels_n, shard.scale

    def reduce(self, first_column: int, group: torch_dist.ProcessGroup | None) -> None:
        logits = self.logits_MnV
        vocabulary, ranks = logits.shape[-1], torch_dist.get_world_size(group)
        top_Mn, column_Mn = logits.max(-1)
        tops = torch.stack([top_Mn, (column_Mn + first_column).to(top_Mn.dtype)])
        every = tops.new_empty(ranks * 2, *top_Mn.shape)
        all_gather(every, tops, group=group)
        every_W2Mn = every.view(ranks, 2, *top_Mn.shape)
        self.max_Mn, winner_Mn = every_W2Mn[:, 0].max(0)
        column_Mn = every_W2Mn[:, 1].gather(0, winner_Mn[None])[0]
        self.top1 = column_Mn[:-1] == column_Mn[-1]

        self.at_n = self.labels_n - first_column
        self.is_here_n = (self.at_n >= 0) & (self.at_n < vocabulary)
        index_n = self.at_n.where(self.is_here_n, 0)
        label_Kn = logits[:-1].gather(-1, index_n.expand(len(logits) - 1, -1)[..., None])[..., 0]
        logits.sub_(self.max_Mn.unsqueeze(-1))
        difference_KnV = logits[-1] - logits[:-1]
        logits.exp_()
        dot_Kn = (logits[-1] * difference_KnV).sum(-1)
        holders_1n = self.is_here_n[None].to(logits.dtype)
        parts = [logits.sum(-1), dot_Kn, label_Kn * holders_1n, holders_1n]
        sums = torch.cat(parts)
        torch_dist.all_reduce(sums, group=group)
        self.sum_Mn, self.dot_Kn, self.label_Kn, holders_1n = sums.split([len(p) for p in parts])
        is_lost_1n = (holders_1n == 0) & (self.labels_n != IGNORE)
        self.label_Kn = self.label_Kn.masked_fill(is_lost_1n, float("nan"))

    def losses(self) -> Tensor:
        """[2, K, n]: CE and KL per row."""
        log_sum_Mn = self.sum_Mn.log()
        ce_Kn = log_sum_Mn[:-1] + self.max_Mn[:-1] - self.label_Kn
        kl_Kn = self.dot_Kn / self.sum_Mn[-1] - log_sum_Mn[-1] + log_sum_Mn[:-1]
        return torch.stack([ce_Kn, kl_Kn])

    def dlogits_(self, a_K1: Tensor, b_K1: Tensor, weights_n: Tensor, first: int) -> Tensor:
        """d loss / d (rows @ shard.T) [K, n, v], in place of the student's exponentials."""
        e_MnV, weights_Kn1 = self.logits_MnV, (weights_n * self.scale)[None, :, None]
        d_KnV = e_MnV[:-1].mul_(((a_K1 + b_K1) / self.sum_Mn[:-1]).unsqueeze(-1))
        d_KnV -= e_MnV[-1] * (b_K1 / self.sum_Mn[-1]).unsqueeze(-1)
        index_n = self.at_n.where(self.is_here_n, 0)
        on_label_Kn = -a_K1 * self.is_here_n.to(d_KnV.dtype)
        d_KnV.scatter_add_(-1, index_n.expand(len(d_KnV), -1)[..., None], on_label_Kn[..., None])
        d_KnV *= weights_Kn1
        if self.slope is not None:
            d_KnV *= self.slope.view(e_MnV.shape)[:-1]
        return d_KnV


def _largest(
    sizes: tuple[int, ...], device: torch.device, group: torch_dist.ProcessGroup | None
) -> list[int]:
    largest = torch.tensor(sizes, device=device)
    torch_dist.all_reduce(largest, torch_dist.ReduceOp.MAX, group=group)
    return largest.tolist()


def _gather_rows(
    rows_KNH: Tensor,
    teacher_rows_NH: Tensor,
    labels_N: Tensor,
    longest: int,
    ranks: int,
    group: torch_dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """(each rank's [rows; teacher rows] [W, K + 1, N, H], labels [W, N]), padded to the longest."""
    passes, num_rows, width = rows_KNH.shape
    own = rows_KNH.new_zeros(passes + 1, longest, width)
    own[:passes, :num_rows], own[passes, :num_rows] = rows_KNH, teacher_rows_NH
    stacked = own.new_empty(ranks * (passes + 1), longest, width)
    all_gather(stacked, own, group=group)
    own_labels = torch.full((longest,), IGNORE, dtype=torch.int64, device=labels_N.device)
    own_labels[:num_rows] = labels_N
    labels = own_labels.new_empty(ranks * longest)
    all_gather(labels, own_labels, group=group)
    return stacked.view(ranks, passes + 1, longest, width), labels.view(ranks, longest)
