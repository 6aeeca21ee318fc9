"""Other people's fused head losses, each where it is installed and with its best settings.

Raises what they raise: race.py enters a peer that cannot run as failed, with its reason.
"""

import importlib.util
from collections.abc import Callable

from torch import Tensor

from benchmarks.head_cases import Numbers
from benchmarks.race import Contestants


def distillation_peers(numbers: Numbers) -> Contestants:
    """CE + KL through a frozen head."""
    peers: Contestants = {}
    if not installed("liger_kernel"):
        return peers
    on_cuda, num_rows = numbers.weight.is_cuda, len(numbers.labels)
    chunks = (512, 1024, 2048, 4096) if on_cuda else (1024,)
    for chunk in sorted({min(num_rows, chunk) for chunk in chunks}):
        peers[f"liger chunked, {chunk} rows"] = liger_chunked(numbers, chunk, compiled=on_cuda)
    if on_cuda:
        peers["liger JSD + CE"] = liger_two_calls(numbers)
    return peers


def ce_peers(numbers: Numbers) -> Contestants:
    """CE alone, through a trained head. CUDA only."""
    peers: Contestants = {}
    if not numbers.weight.is_cuda:
        return peers
    if installed("liger_kernel"):
        peers["liger linear CE"] = _of_leaves(numbers, liger_ce())
    if installed("cut_cross_entropy"):
        for impl in ("cce", "cce_exact"):
            peers[f"cut-cross-entropy, {impl}"] = _of_leaves(numbers, cut_ce(impl))
    if installed("quack"):
        for chunk in (4096, 8192):
            peers[f"quack, {chunk} rows"] = _of_leaves(numbers, quack_ce(chunk))
    return peers


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _of_leaves(
    numbers: Numbers, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Forward and backward; returns the head's gradient."""

    def run() -> Tensor:
        rows = numbers.rows[0].clone().requires_grad_()
        weight = numbers.weight.detach().requires_grad_()
        loss(rows, weight, numbers.labels).backward()
        assert weight.grad is not None
        return weight.grad

    return run


def liger_ce() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda rows, weight, labels: loss(weight, rows, labels)


def cut_ce(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda rows, weight, labels: linear_cross_entropy(
        rows, weight, labels, reduction="sum", impl=impl
    )


def quack_ce(chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda rows, weight, labels: chunked_linear_cross_entropy(
        rows, weight, labels, chunk_size=min(chunk, len(rows)), reduction="sum"
    )


def liger_chunked(numbers: Numbers, chunk: int, compiled: bool) -> Callable[[], Tensor]:
    """Liger's one-call CE + JSD(beta 0), which is our CE + KL, with its weights doubled back."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=compiled, chunk_size=chunk
    )

    def run() -> Tensor:
        rows = numbers.leaf()
        value = loss(rows[0], numbers.weight, numbers.teacher, numbers.weight, numbers.labels)
        (value * 2 * len(numbers.labels)).backward()
        assert rows.grad is not None
        return rows.grad

    return run


def liger_two_calls(numbers: Numbers) -> Callable[[], Tensor]:
    """Liger's Triton JSD and Triton linear CE, one after the other. CUDA only."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.0)
    ce = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def run() -> Tensor:
        rows = numbers.leaf()
        soft = jsd(rows[0], numbers.weight, numbers.teacher, numbers.weight, None)
        (ce(numbers.weight, rows[0], numbers.labels) + soft * len(numbers.labels)).backward()
        assert rows.grad is not None
        return rows.grad

    return run
