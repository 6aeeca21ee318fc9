"""A distance through the student's head against autograd in double precision on all logits."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genrecal_ds.ops.gemm import scaled
from genrecal_ds.ops.head_loss import Head
from genrecal_ds.ops.linear_distance import linear_distance

pytestmark = pytest.mark.unit
M, D, V = 61, 24, 507
SUBSETS = [*product((True, False), repeat=3)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of 16 rows."""
    monkeypatch.setattr("genrecal_ds.ops.linear_distance.CHUNK_BYTES", {"cpu": 0})


def make(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = ((M, D), (V, D), (V,), (M, V))
    return [torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype) for shape in shapes]


def to_target(target):
    """Total variation: no closed form that an epilogue could have."""
    return lambda logits, part: (logits.softmax(-1) - target[part].softmax(-1)).abs().sum(-1)


def truth(rows, weight, bias, target, scale=1.0, softcap=None):
    leaves = [x.detach().double().requires_grad_() for x in (rows, weight, bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distances = to_target(target.double())(logits, slice(None))
    (3.0 * distances.sum()).backward()
    return distances.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, 5.0)])
@pytest.mark.parametrize("wanted", SUBSETS)
def test_equals_double_precision_autograd(wanted, scale, softcap):
    *tensors, target = make()
    distances, gradients = truth(*tensors, target, scale, softcap)
    leaves = [x.requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    head = Head(leaves[1], leaves[2], scale, softcap)
    total, by_row = linear_distance(leaves[0], head, to_target(target))
    assert total.requires_grad == any(wanted) and not by_row.requires_grad
    torch.testing.assert_close(by_row.double(), distances, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(total.double().detach(), distances.sum())
    if any(wanted):
        (3.0 * total).backward()
    for leaf, want, gradient in zip(leaves, wanted, gradients, strict=True):
        if not want:
            assert leaf.grad is None
            continue
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-4, atol=3e-6)


def test_low_precision_keeps_logits_in_fp32():
    rows, weight, bias, target = make(torch.bfloat16)
    distances, gradients = truth(rows, weight, bias, target)
    leaves = [x.requires_grad_() for x in (rows, weight, bias)]
    total, by_row = linear_distance(leaves[0], Head(*leaves[1:]), to_target(target.float()))
    total.backward()
    assert by_row.dtype == torch.float32
    torch.testing.assert_close(by_row.double(), distances, rtol=1e-5, atol=2e-6)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        error = (3.0 * leaf.grad.double() - gradient).norm() / gradient.norm()
        assert error < 0.005


def test_no_chunk_is_larger_than_its_share():
    *tensors, target = make()
    seen = []

    def distance(logits, part):
        seen.append((part.start, len(logits)))
        return to_target(target)(logits, part)

    head = Head(tensors[1], tensors[2])
    linear_distance(tensors[0], head, distance)
    assert seen == [(0, 16), (16, 16), (32, 16), (48, 13)]
    seen.clear()
    linear_distance(tensors[0], head, distance, sizes=[5, 0, 56])
    assert seen == [(0, 5), (5, 0), (5, 56)]


def test_rows_that_nothing_depends_on_have_a_gradient_of_zeros():
    *tensors, _ = make()
    leaves = [x.requires_grad_() for x in tensors]
    total, by_row = linear_distance(
        leaves[0], Head(*leaves[1:]), lambda logits, part: logits.new_zeros(len(logits))
    )
    total.backward()
    assert by_row.abs().sum() == 0
    assert all(leaf.grad is not None and leaf.grad.abs().sum() == 0 for leaf in leaves)


def test_without_gradient_none_is_formed():
    *tensors, target = make()
    leaves = [x.requires_grad_() for x in tensors]

    def distance(logits, part):
        assert not torch.is_grad_enabled()
        return to_target(target)(logits, part)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        total, _ = linear_distance(leaves[0], Head(*leaves[1:]), distance)
    assert counter.get_total_flops() == 2 * M * V * D and not total.requires_grad


@pytest.mark.parametrize(("is_trained", "products"), [(True, 3), (False, 2)])
def test_products_of_the_head(is_trained, products):
    rows, weight, _, target = make()
    head = Head(weight.requires_grad_(is_trained))
    with FlopCounterMode(display=False) as counter:
        linear_distance(rows.requires_grad_(), head, to_target(target))[0].backward()
    assert counter.get_total_flops() == products * 2 * M * V * D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaled_is_rounded_once(dtype):
    sums, factor = torch.randn(300, 70, dtype=torch.float64), torch.tensor(0.3337)
    sums = sums.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(scaled(sums, factor, dtype), (sums * factor).to(dtype))


def test_what_does_not_fit_is_named():
    rows, weight, bias, target = make()
    distance = to_target(target)
    with pytest.raises(ValueError, match="head.weight_VH"):
        linear_distance(rows, Head(weight[:, :3], bias), distance)
    with pytest.raises(ValueError, match="head.bias_V"):
        linear_distance(rows, Head(weight, bias[:3]), distance)
    with pytest.raises(ValueError, match="sizes: 60 rows in all, expected 61"):
        linear_distance(rows, Head(weight, bias), distance, sizes=[60])
