"""Run on every rank: the three placements of the frozen head beside the whole head.

ranks_head.py TEACHER_FOLDER
"""

import sys

import torch
import torch.distributed as torch_dist

from genrecal_ds import dist
from genrecal_ds.models import head as head_module
from genrecal_ds.models.head import load_frozen_head, place_frozen_head
from genrecal_ds.ops.head_loss import Head, chunked, head_loss, vocab_parallel
from genrecal_ds.ops.head_loss.vocab_parallel import head_loss_vocab_parallel

CPU = torch.device("cpu")


class Wire:
    """Bytes that each collective brings to this rank, read where the collectives are called."""

    def __enter__(self):
        self.received: list[tuple[str, int]] = []
        self.saved = [
            (head_module, "all_gather"), (vocab_parallel, "all_gather"),
            (torch_dist, "reduce_scatter_tensor"), (torch_dist, "all_reduce"),
        ]  # fmt: skip
        self.saved = [(place, name, getattr(place, name)) for place, name in self.saved]
        for place, name, real in self.saved:
            setattr(place, name, self.counting(name, real))
        return self

    def counting(self, name, real):
        def call(out, *args, **kwargs):
            others = dist.world_size() - 1
            size = out.numel() * out.element_size()
            # all_gather's output is everybody's; of reduce_scatter's, each other rank sends one
            self.received.append((name, size // (others + 1) * others if "gather" in name else
                                  size * others))  # fmt: skip
            return real(out, *args, **kwargs)

        return call

    def __exit__(self, *exception):
        for place, name, real in self.saved:
            setattr(place, name, real)

    def of(self, name: str) -> list[int]:
        return [size for called, size in self.received if called == name]


def inputs(num_rows, width, vocabulary, passes, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(passes, num_rows, width, generator=generator)
    teacher = rows[0] + 0.3 * torch.randn(num_rows, width, generator=generator)
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    labels[::5] = -100
    return rows, teacher, labels


def evaluate(loss, rows, *rest):
    rows = rows.clone().requires_grad_()
    out = loss(rows, *rest)
    (gradient,) = torch.autograd.grad(2.0 * out.loss_sum, rows)
    return out, gradient


def check_equal(actual, expected) -> None:
    (out, gradient), (truth, true_gradient) = actual, expected
    torch.testing.assert_close(out.loss_sum, truth.loss_sum, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out.ce_KN, truth.ce_KN, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(out.kl_KN, truth.kl_KN, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=2e-6)
    assert torch.equal(out.top1_KN, truth.top1_KN)


def check_placements(folder: str) -> None:
    whole = load_frozen_head(folder, torch.float32, CPU)
    vocabulary, width = whole.weight_VH.shape
    ranks = dist.world_size()
    cases = ((1, ([1.0], [1.0])), (2, ([1.0, 0.5], [2.0, 0.0])))
    for passes, weights in cases:
        # Ranks differ in rows; in the second round rank 0 has none and must still take part.
        num_rows = 13 + 4 * dist.rank() if passes == 1 else 9 * dist.rank()
        longest = 13 + 4 * (ranks - 1) if passes == 1 else 9 * (ranks - 1)
        rows, teacher, labels = inputs(num_rows, width, vocabulary, passes, dist.rank())
        expected = evaluate(head_loss, rows, teacher, labels, whole, *weights)
        for placement in ("replicated", "gathered", "vocab_parallel"):
            head = place_frozen_head(folder, torch.float32, CPU, placement)
            with Wire() as wire:
                actual = evaluate(head.loss, rows, teacher, labels, *weights)
            check_equal(actual, expected)
            gathered, reduced = wire.of("all_gather"), wire.of("reduce_scatter_tensor")
            if placement == "replicated":
                assert wire.received == []
            elif placement == "gathered":
                share = -(-vocabulary // ranks)
                assert head.share.weight_VH.shape[0] == share
                assert gathered == [4 * share * width * (ranks - 1)] and reduced == []
            else:
                assert head.share.weight_VH.shape[0] <= -(-vocabulary // ranks)
                assert gathered[0] == 4 * (passes + 1) * (ranks - 1) * longest * width
                assert reduced == [4 * passes * (ranks - 1) * longest * width]


def check_every_head(monkey_chunk: int) -> None:
    """Bias, scale and softcap, several chunks, bf16; shares of unequal size."""
    chunked.CHUNK_BYTES = {"cpu": monkey_chunk}
    ranks, rank, vocabulary, width = dist.world_size(), dist.rank(), 101, 16
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(vocabulary, width, generator=generator)
    bias = torch.randn(vocabulary, generator=generator)
    first, last = rank * vocabulary // ranks, (rank + 1) * vocabulary // ranks
    for scale, softcap, dtype in (
        (1.0, None, torch.float32), (0.7, 5.0, torch.float32), (1.3, None, torch.bfloat16),
    ):  # fmt: skip
        whole = Head(weight.to(dtype), bias.to(dtype), scale, softcap)
        share = Head(weight[first:last].to(dtype), bias[first:last].to(dtype), scale, softcap)
        rows, teacher, labels = inputs(40 + 3 * rank, width, vocabulary, 2, rank)
        rows, teacher = rows.to(dtype), teacher.to(dtype)
        weights = ([1.0, 0.5], [2.0, 1.0])
        expected = evaluate(head_loss, rows, teacher, labels, whole, *weights)
        actual = evaluate(head_loss_vocab_parallel, rows, teacher, labels, share, first, *weights)
        if dtype == torch.float32:
            check_equal(actual, expected)
        else:  # each share's gradient is rounded to bf16 before the sum
            torch.testing.assert_close(actual[0].loss_sum, expected[0].loss_sum, rtol=1e-5, atol=0)
            error = (actual[1].float() - expected[1].float()).norm() / expected[1].float().norm()
            assert error < 2**-7, error


def check_refusals() -> None:
    """A label that no rank holds is NaN on its own row alone; other bad input is a ValueError."""
    ranks, rank, vocabulary, width = dist.world_size(), dist.rank(), 50, 8
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(3))
    first, last = rank * vocabulary // ranks, (rank + 1) * vocabulary // ranks
    share = Head(weight[first:last])
    rows, teacher, labels = inputs(6, width, vocabulary, 1, rank)
    labels[1], labels[2] = (57, -3) if rank == 0 else (1, 2)
    out = head_loss_vocab_parallel(rows, teacher, labels, share, first, [1.0], [1.0])
    bad = [1, 2] if rank == 0 else []
    assert out.ce_KN[0].isnan().nonzero().flatten().tolist() == bad
    for arguments in (
        (rows, teacher[1:], labels, share), (rows, teacher, labels.int(), share),
        (rows, teacher, labels, share._replace(valid_vocab=3)),
    ):  # fmt: skip
        try:
            head_loss_vocab_parallel(*arguments, first, [1.0], [1.0])
        except ValueError:
            continue
        raise AssertionError("bad input was taken")


if __name__ == "__main__":
    torch_dist.init_process_group("gloo")
    check_placements(sys.argv[1])
    check_every_head(4 * 101 * 3 * 16)
    check_refusals()
    torch_dist.destroy_process_group()
