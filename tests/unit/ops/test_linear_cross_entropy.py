"""The student's CE against autograd in double precision, for every subset of gradients."""

import warnings
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from genrecal_ds.ops.head_loss import Head, kernels
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.unit
N, D, V = 61, 24, 507
SUBSETS = [*product((True, False), repeat=3)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 256)
    monkeypatch.setattr("genrecal_ds.ops.head_loss.chunked.CHUNK_BYTES", {"cpu": 32 * V * 4})


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).float()

    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::7] = -100
    return normal(N, D), labels, normal(V, D), normal(V), normal(N).abs()


def truth(rows, labels, weight, bias, row_weights, scale=1.0, softcap=None):
    leaves = [t.detach().double().requires_grad_() for t in (rows, weight, bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ce = cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    (ce * row_weights.double()).sum().backward()
    return ce.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.7, 5.0)])
@pytest.mark.parametrize("wanted", SUBSETS)
def test_equals_double_precision_autograd(impl, wanted, scale, softcap):
    rows, labels, weight, bias, row_weights = make()
    ce, gradients = truth(rows, labels, weight, bias, row_weights, scale, softcap)
    leaves = [t.requires_grad_(want) for t, want in zip((rows, weight, bias), wanted, strict=True)]
    head = Head(leaves[1], leaves[2], scale, softcap)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="triton")
        total, per_row = linear_cross_entropy(leaves[0], labels, head, row_weights, impl=impl)
    assert total.requires_grad == any(wanted) and not per_row.requires_grad
    torch.testing.assert_close(per_row.double(), ce, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(total.detach().double(), (ce * row_weights).sum())
    if any(wanted):
        (2.0 * total).backward()
    for leaf, gradient, want in zip(leaves, gradients, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad.double(), 2 * gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("trains_head, gemms", [(True, 3), (False, 2)])
def test_exactly_as_many_gemms_as_the_floor(trains_head, gemms):
    rows, labels, weight, _, row_weights = make()
    head = Head(weight.requires_grad_(trains_head))
    with FlopCounterMode(display=False) as counter:
        total, _ = linear_cross_entropy(rows.requires_grad_(), labels, head, row_weights)
        total.backward()
    assert counter.get_total_flops() == gemms * 2 * N * V * D


def test_without_gradient_nothing_is_formed_for_one():
    """Validation of a stage that trains the head: the logits' GEMM alone, and no [V, D] sum."""
    rows, labels, weight, _, row_weights = make()
    head = Head(weight.requires_grad_())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        total, _ = linear_cross_entropy(rows.requires_grad_(), labels, head, row_weights)
    assert counter.get_total_flops() == 2 * N * V * D and not total.requires_grad


def test_tracing_the_whole_graph_changes_nothing():
    rows, labels, weight, _, row_weights = make()

    def loss(x, w):
        return linear_cross_entropy(x * 2, labels, Head(w), row_weights)[0]

    leaves = (rows.requires_grad_(), weight.requires_grad_())
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, value in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(actual, value)


@pytest.mark.parametrize(
    "trains_head, sizes", [(False, [N * D * 2]), (True, [N * D * 2, V * D * 4])]
)
def test_saves_the_rows_gradient_and_for_a_trained_head_one_fp32_sum(trains_head, sizes):
    rows, labels, weight, _, row_weights = make()
    rows, weight, saved = rows.bfloat16(), weight.bfloat16().requires_grad_(trains_head), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(rows.requires_grad_(), labels, Head(weight), row_weights)
    assert sorted(t.numel() * t.element_size() for t in saved) == sizes


def test_low_precision_sums_of_many_chunks_lose_nothing(monkeypatch):
    monkeypatch.setattr("genrecal_ds.ops.head_loss.chunked.CHUNK_BYTES", {"cpu": 1})
    rows, labels, weight, bias, row_weights = make()
    low = [t.bfloat16() for t in (rows, weight, bias)]
    _, gradients = truth(low[0], labels, low[1], low[2], row_weights)
    leaves = [t.requires_grad_() for t in low]
    total, _ = linear_cross_entropy(leaves[0], labels, Head(leaves[1], leaves[2]), row_weights)
    total.backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        error = (leaf.grad.double() - gradient).norm() / gradient.norm()
        assert leaf.grad.dtype == torch.bfloat16 and error < 2**-8


def test_low_precision_is_no_worse_than_plain_torch():
    """Elementwise, for rows, weight and bias, with peaked logits."""
    rows, labels, weight, bias, row_weights = make()
    rows *= 35.0 / (rows @ weight.T).abs().max()
    low = [t.bfloat16() for t in (rows, weight, bias)]
    _, gradients = truth(low[0], labels, low[1], low[2], row_weights)
    plain = [t.clone().requires_grad_() for t in low]
    logits = torch.nn.functional.linear(*plain).float()
    ce = cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    (ce * row_weights).sum().backward()
    leaves = [t.clone().requires_grad_() for t in low]
    total, _ = linear_cross_entropy(leaves[0], labels, Head(leaves[1], leaves[2]), row_weights)
    total.backward()
    for ours, theirs, true in zip(leaves, plain, gradients, strict=True):
        rounding = (true.bfloat16().double() - true).abs()
        limit = (theirs.grad.double() - true).abs().max() + rounding
        assert ((ours.grad.double() - true).abs() <= limit).all()
        error, plain_error = ((g.grad.double() - true).norm() for g in (ours, theirs))
        assert error <= plain_error


def test_no_rows_and_all_rows_masked():
    rows, labels, weight, _, row_weights = make()
    for keep, masked in ((slice(0, 0), labels[:0]), (slice(None), torch.full((N,), -100))):
        leaf, head = rows[keep].clone().requires_grad_(), weight.clone().requires_grad_()
        total, per_row = linear_cross_entropy(leaf, masked, Head(head), row_weights[keep])
        total.backward()
        assert total == 0 and per_row.sum() == 0
        assert leaf.grad.abs().sum() == 0 and head.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(rows_ND=a["rows_ND"].half()), "rows_ND: .*float32"),
        (lambda a: a.update(rows_ND=a["rows_ND"][:, 1:].contiguous()), "head.weight_VH: "),
        (lambda a: a.update(rows_ND=a["rows_ND"].mT.contiguous().mT), "rows_ND: strides"),
        (lambda a: a.update(labels_N=a["labels_N"][1:]), "labels_N: "),
        (lambda a: a.update(labels_N=a["labels_N"] + V), "labels_N: "),
        (lambda a: a.update(row_weights_N=a["labels_N"]), "row_weights_N: .*float"),
        (lambda a: a.update(head=Head(a["head"].weight_VH, torch.zeros(2))), "head.bias_V: "),
        (lambda a: a.update(impl="reference"), "impl: 'reference'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    rows, labels, weight, _, row_weights = make()
    given = dict(rows_ND=rows, labels_N=labels, head=Head(weight), row_weights_N=row_weights)
    change(given)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)
