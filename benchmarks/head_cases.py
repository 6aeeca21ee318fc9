"""The head losses and their peers on the same numbers, with a check that they compute the same.

Shapes: N rows, H width, V vocabulary. Logits are peaked like a trained teacher's: its best token
has about 0.6 of the probability, and the student's rows are near the teacher's.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from benchmarks.race import Contestants
from genrecal_ds.ops.head_loss import Head, head_loss
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy


class Numbers:
    """One case's tensors. Random, never zeros: zeros make a GPU's GEMM faster than it is."""

    def __init__(
        self, num_rows: int, width: int, vocabulary: int, dtype: torch.dtype, noise: float = 0.3
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.weight = (normal(vocabulary, width) / width**0.5).to(dtype)
        self.labels = torch.randint(0, vocabulary, (num_rows,), generator=generator, device=device)
        teacher = normal(num_rows, width)
        # A direction of its own label lifts one logit per row by about ln V + ln(0.6 / 0.4).
        lift = torch.log(torch.tensor(1.5 * vocabulary)).item() + 0.5
        own = self.weight[self.labels].float()
        teacher += lift * own / own.square().sum(-1, keepdim=True)
        self.teacher = teacher.to(dtype)
        rows = [teacher + noise * normal(num_rows, width) for _ in range(2)]
        self.rows = torch.stack(rows).to(dtype)
        self.gemm_flop = 2 * num_rows * vocabulary * width

    def leaf(self, passes: int = 1) -> Tensor:
        return self.rows[:passes].clone().requires_grad_()


def gemms(numbers: Numbers, logits: int, rows: int, weight: int = 0) -> Callable[[], None]:
    """The yardstick: the loss's bare GEMMs, whole, with nothing between them: so many to logits,
    from dlogits to the rows, and from dlogits to the weight."""
    inputs, head = numbers.rows[0], numbers.weight
    dlogits = (inputs @ head.t()).detach()

    def run() -> None:
        for _ in range(logits):
            torch.mm(inputs, head.t())
        for _ in range(rows):
            torch.mm(dlogits, head)
        for _ in range(weight):
            torch.mm(dlogits.t(), inputs)

    return run


def ours(numbers: Numbers, passes: int = 1) -> Callable[[], Tensor]:
    head = Head(numbers.weight)

    def run() -> Tensor:
        rows, weights = numbers.leaf(passes), [1.0] * passes
        out = head_loss(rows, numbers.teacher, numbers.labels, head, weights, weights)
        out.loss_sum.backward()
        assert rows.grad is not None
        return rows.grad

    return run


def ours_twice(numbers: Numbers) -> Callable[[], None]:
    """Stage 1 without sharing the teacher's logits: one call a pass."""

    def run() -> None:
        for k in range(2):
            rows = numbers.rows[k : k + 1].clone().requires_grad_()
            out = head_loss(
                rows, numbers.teacher, numbers.labels, Head(numbers.weight), [1.0], [1.0]
            )
            out.loss_sum.backward()

    return run


def naive(numbers: Numbers) -> Callable[[], Tensor]:
    """torch eager: whole logits, fp32 softmaxes, autograd."""

    def run() -> Tensor:
        rows = numbers.leaf()
        logits = linear(rows[0], numbers.weight).float()
        log_p = linear(numbers.teacher, numbers.weight).float().log_softmax(-1)
        loss = cross_entropy(logits, numbers.labels, reduction="sum")
        loss = loss + kl_div(logits.log_softmax(-1), log_p, reduction="sum", log_target=True)
        loss.backward()
        assert rows.grad is not None
        return rows.grad

    return run


def student_ce(numbers: Numbers) -> Callable[[], Tensor]:
    weights = torch.ones(len(numbers.labels), device=numbers.weight.device)

    def run() -> Tensor:
        rows, weight = numbers.leaf()[0].detach(), numbers.weight.detach().requires_grad_()
        rows.requires_grad_()
        total, _ = linear_cross_entropy(rows, numbers.labels, Head(weight), weights)
        total.backward()
        assert weight.grad is not None
        return weight.grad

    return run


def student_ce_torch(numbers: Numbers) -> Callable[[], Tensor]:
    def run() -> Tensor:
        rows, weight = numbers.leaf()[0].detach(), numbers.weight.detach().requires_grad_()
        rows.requires_grad_()
        logits = linear(rows, weight).float()
        cross_entropy(logits, numbers.labels, reduction="sum").backward()
        assert weight.grad is not None
        return weight.grad

    return run


def agree(contestants: Contestants, truth: str, tolerance: float) -> dict[str, float]:
    """{name: relative difference of its gradient}. Raises when they compute different losses."""
    expected = contestants[truth]().double()
    errors = {}
    for name, run in contestants.items():
        gradient = run()
        if not isinstance(gradient, Tensor):
            continue
        errors[name] = ((gradient.double() - expected).norm() / expected.norm()).item()
        if errors[name] > tolerance:
            raise AssertionError(f"{name} differs from {truth} by {errors[name]:.2e}")
    return errors


def error_in_fp64(numbers: Numbers, gradient: Tensor, rows: int = 256) -> float:
    """Relative error of a gradient of CE + KL against fp64, on the first rows."""
    weight = numbers.weight.double()
    leaf = numbers.rows[0, :rows].double().requires_grad_()
    logits = leaf @ weight.t()
    log_p = (numbers.teacher[:rows].double() @ weight.t()).log_softmax(-1)
    loss = cross_entropy(logits, numbers.labels[:rows], reduction="sum")
    loss = loss + kl_div(logits.log_softmax(-1), log_p, reduction="sum", log_target=True)
    (true,) = torch.autograd.grad(loss, leaf)
    return ((gradient[0, :rows].double() - true).norm() / true.norm()).item()
