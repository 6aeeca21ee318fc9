"""head_loss against autograd in double precision: every form, every implementation."""

import math
import os
import warnings
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.flop_counter import FlopCounterMode

from genrecal_ds.ops.gemm import rows_per_chunk
from genrecal_ds.ops.head_loss import Head, chunked, head_loss, kernels
from genrecal_ds.ops.head_loss.epilogue import softmax_epilogue_

pytestmark = pytest.mark.unit
N, H, V = 61, 24, 507
CHUNK_ROWS = 32
HEADS = {"plain": (False, 1.0, None), "all": (True, 0.7, 5.0), "affine": (True, 1.3, None)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two chunks at K = 1 and two column blocks, the last of each of another size."""
    monkeypatch.setattr(kernels, "BLOCK", 256)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": CHUNK_ROWS * V * 4 * 2})
    monkeypatch.setattr("genrecal_ds.ops.head_loss.epilogue.CPU_BLOCK_BYTES", 7 * V * 4)


def make(num_passes=1, seed=0, spread=0.3, size=(N, H, V), peak=None):
    """(rows, teacher rows, labels, weight) in fp64; peak scales the logits' greatest to it."""
    num_rows, width, vocabulary = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    teacher, weight = normal(num_rows, width), normal(vocabulary, width) / width**0.5
    teacher *= 1.0 if peak is None else peak / (teacher @ weight.T).abs().max()
    rows = teacher + spread * teacher.std() * normal(num_passes, num_rows, width)
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    labels[::7] = -100
    return rows, teacher, labels, weight


def make_head(weight, kind, dtype=torch.float32):
    has_bias, scale, softcap = HEADS[kind]
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64) if has_bias else None
    return Head(weight.to(dtype), None if bias is None else bias.to(dtype), scale, softcap)


def full_logits(head, rows):
    y = rows.double() @ head.weight_VH.double().T
    y = (y + (0 if head.bias_V is None else head.bias_V.double())) * head.scale
    return y if head.softcap is None else head.softcap * torch.tanh(y / head.softcap)


def truth(rows, teacher, labels, head, ce, kl):
    """(loss, d loss / d rows) by torch's own losses in fp64, without any code of the package."""
    rows = rows.double().requires_grad_()
    valid, total = labels != -100, 0.0
    log_p = full_logits(head, teacher)[valid].log_softmax(-1)
    for k in range(len(ce)):
        logits = full_logits(head, rows[k])
        total = total + ce[k] * cross_entropy(
            logits, labels, ignore_index=-100, reduction="sum"
        ) + kl[k] * kl_div(
            logits[valid].log_softmax(-1), log_p, reduction="sum", log_target=True
        )  # fmt: skip
    total.backward()
    return total.detach(), rows.grad


def run(rows, teacher, labels, head, ce, kl, grad_output=1.0, **options):
    rows = rows.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module="triton"
        )  # inf - inf behind the interpreter's mask
        out = head_loss(rows, teacher, labels, head, ce, kl, **options)
    (gradient,) = torch.autograd.grad(grad_output * out.loss_sum, rows)
    return out, gradient


@pytest.fixture(params=["torch", "triton", "reference"])
def impl(request):
    return request.param


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("ce, kl", [((1.0,), (1.0,)), ((1.0, 0.5), (2.0, 0.0)), ((0.0,), (1.0,))])
def test_equals_double_precision_autograd(impl, kind, ce, kl):
    rows, teacher, labels, weight = make(len(ce))
    head = make_head(weight, kind)
    expected, gradient = truth(rows.float(), teacher.float(), labels, head, ce, kl)
    out, actual = run(
        rows.float(), teacher.float(), labels, head, ce, kl, grad_output=3.0, impl=impl
    )
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(actual.double(), 3 * gradient, rtol=1e-4, atol=2e-6)
    valid = labels != -100
    assert actual[:, ~valid].abs().max() == 0
    assert out.ce_KN[:, ~valid].abs().max() == 0 and out.kl_KN[:, ~valid].abs().max() == 0
    sums = sum(a * out.ce_KN[k].sum() + b * out.kl_KN[k].sum() for k, (a, b) in
               enumerate(zip(ce, kl, strict=True)))  # fmt: skip
    torch.testing.assert_close(sums, out.loss_sum.detach())
    agreement = full_logits(head, rows).argmax(-1) == full_logits(head, teacher).argmax(-1)
    assert torch.equal(out.top1_KN, agreement & valid)


@pytest.mark.parametrize("size", [(1, 8, 252), (123, 40, 507), (252, 16, 123)])
def test_sizes_that_divide_no_block(impl, size):
    rows, teacher, labels, weight = make(2, size=size)
    labels[0] = 3
    head = make_head(weight, "affine")
    expected, gradient = truth(rows.float(), teacher.float(), labels, head, (1, 1), (1, 1))
    out, actual = run(rows.float(), teacher.float(), labels, head, (1, 1), (1, 1), impl=impl)
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(actual.double(), gradient, rtol=1e-4, atol=2e-6)


def test_identical_rows_have_no_kl(impl):
    rows, teacher, labels, weight = make(1, spread=0.0, peak=35.0)
    rows, teacher, head = rows.float(), teacher.float(), Head(weight.float())
    out, gradient = run(rows, teacher, labels, head, (0.0,), (1.0,), impl=impl)
    assert out.kl_KN.abs().max() < 2e-6 and torch.equal(out.top1_KN[0], labels != -100)
    scale = full_logits(head, teacher).softmax(-1).sum(-1).max() * weight.abs().max()
    assert gradient.abs().max() < 1e-5 * scale


@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_kl_gradient_of_rows_near_the_teachers_is_a_rounding_away(impl, spread):
    """KL alone, a bf16 head: the error is a rounding of the gradient, not of its large parts."""
    rows, teacher, labels, weight = make(1, spread=spread, peak=35.0)
    low = [t.bfloat16() for t in (rows, teacher, weight)]
    head, valid = Head(low[2]), labels != -100
    _, gradient = truth(low[0], low[1], labels, head, (0.0,), (1.0,))
    _, actual = run(low[0], low[1], labels, head, (0.0,), (1.0,), impl=impl)
    error = (actual[0].double() - gradient[0])[valid].norm()
    assert error <= 2**-7 * gradient.norm() + 1e-5


@pytest.mark.parametrize("num_passes", [1, 2])
def test_low_precision_is_no_worse_than_plain_torch(impl, num_passes):
    """Peaked logits, p near q: where logits kept in bf16 lose the difference of the softmaxes."""
    rows, teacher, labels, weight = make(num_passes, spread=0.03, peak=35.0)
    low = [t.bfloat16() for t in (rows, teacher, weight)]
    weights = [1.0] * num_passes
    expected, gradient = truth(low[0], low[1], labels, Head(low[2]), weights, weights)
    out, actual = run(low[0], low[1], labels, Head(low[2]), weights, weights, impl=impl)

    leaf = low[0].clone().requires_grad_()
    plain_loss = 0.0
    log_p = (low[1] @ low[2].T).float().log_softmax(-1)[labels != -100]
    for k in range(num_passes):
        logits = (leaf[k] @ low[2].T).float()
        log_q = logits.log_softmax(-1)[labels != -100]
        plain_loss = plain_loss + cross_entropy(logits, labels, reduction="sum") + kl_div(
            log_q, log_p, reduction="sum", log_target=True
        )  # fmt: skip
    plain_loss.backward()

    def error(value, true):
        return ((value.double() - true).norm() / true.norm()).item()

    plain, ours = error(leaf.grad, gradient), error(actual, gradient)
    assert ours <= 2**-8 and ours < plain / 3, (ours, plain)
    assert error(out.loss_sum, expected) <= error(plain_loss.detach(), expected) + 1e-5
    rounded = gradient.bfloat16().double()
    limit = (leaf.grad.double() - gradient).abs().max() + (rounded - gradient).abs()
    assert ((actual.double() - gradient).abs() <= limit).all()


def test_no_rows_one_row_and_all_rows_masked(impl):
    rows, teacher, labels, weight = make(2)
    head = Head(weight)
    for keep in (slice(0, 0), slice(1, 2)):
        out, gradient = run(
            rows[:, keep].clone(), teacher[keep], labels[keep], head, (1, 1), (1, 1), impl=impl
        )
        assert gradient.shape == rows[:, keep].shape and out.loss_sum.isfinite()
        assert (out.loss_sum == 0) == (keep.stop == 0)
    out, gradient = run(rows, teacher, labels.fill_(-100), head, (1, 1), (1, 1), impl=impl)
    assert out.loss_sum == 0 and gradient.abs().max() == 0 and not out.top1_KN.any()


def test_masked_rows_may_hold_anything(impl):
    """A row without a label never reaches the loss or the gradient, whatever its numbers are."""
    rows, teacher, labels, weight = (t.float() for t in make(1))
    labels = labels.long()
    _, before = run(rows, teacher, labels, Head(weight), (1,), (1,), impl=impl)
    rows[0, labels == -100] *= 1e4
    _, after = run(rows, teacher, labels, Head(weight), (1,), (1,), impl=impl)
    assert torch.equal(before, after) or impl == "reference"
    torch.testing.assert_close(before, after)


def test_only_loss_sum_is_differentiable(impl):
    rows, teacher, labels, weight = make(1)
    teacher, weight = teacher.requires_grad_(), weight.requires_grad_()
    out = head_loss(rows.requires_grad_(), teacher, labels, Head(weight), (1,), (1,), impl=impl)
    assert out.loss_sum.requires_grad
    assert not any(t.requires_grad for t in (out.ce_KN, out.kl_KN, out.top1_KN))
    out.loss_sum.backward()
    assert rows.grad is not None and teacher.grad is None and weight.grad is None


def test_without_gradient_no_gradient_is_formed():
    rows, teacher, labels, weight = (t.float() for t in make(1))
    arguments = (rows, teacher, labels.long(), Head(weight), (1,), (1,))
    with FlopCounterMode(display=False) as counter:
        chunked.head_loss_forward(*arguments, softmax_epilogue_, False)
    assert counter.get_total_flops() == 2 * 2 * N * V * H
    assert not head_loss(*arguments).loss_sum.requires_grad


def test_permuting_the_rows_permutes_the_result(impl):
    rows, teacher, labels, weight = make(2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    out, gradient = run(rows, teacher, labels, Head(weight), (1, 1), (1, 1), impl=impl)
    moved, moved_gradient = run(
        rows[:, order].contiguous(), teacher[order], labels[order], Head(weight), (1, 1), (1, 1),
        impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(moved.kl_KN, out.kl_KN[:, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.loss_sum, out.loss_sum)


# --- exact costs: these gate CI, no timing does ---------------------------------------------


def flops(num_passes):
    rows, teacher, labels, weight = (t.float() for t in make(num_passes))
    head = Head(weight)
    weights = [1.0] * num_passes
    with FlopCounterMode(display=False) as counter:
        chunked.head_loss_forward(
            rows, teacher, labels.long(), head, weights, weights, softmax_epilogue_, True
        )
    return counter.get_total_flops()


@pytest.mark.parametrize("num_passes, gemms", [(1, 3), (2, 5)])
def test_exactly_as_many_gemms_as_the_floor(monkeypatch, num_passes, gemms):
    """Counted on the function that the registered op calls: no counter sees inside the op."""
    assert flops(num_passes) == gemms * 2 * N * V * H
    real = chunked.project_

    def project_twice(out, rows, weight):
        real(out, rows, weight)
        real(out, rows, weight)

    monkeypatch.setattr(chunked, "project_", project_twice)
    assert flops(num_passes) > gemms * 2 * N * V * H


def test_the_registered_op_runs_the_function_that_is_counted(monkeypatch):
    calls = []
    real = chunked.head_loss_forward
    monkeypatch.setattr(
        "genrecal_ds.ops.head_loss.head_loss_forward", lambda *a: calls.append(1) or real(*a)
    )
    rows, teacher, labels, weight = make(1)
    head_loss(rows, teacher, labels, Head(weight), (1,), (1,))
    assert calls == [1]


@pytest.mark.parametrize("num_passes, dtype", [*product((1, 2), (torch.float32, torch.bfloat16))])
def test_memory_is_a_chunk_and_the_gradient(num_passes, dtype):
    """Saved for backward: the rows' gradient. Live at once: the buffers of one chunk."""
    rows, teacher, labels, weight = (t.to(dtype) for t in make(num_passes))
    head, weights = Head(weight), [1.0] * num_passes
    size = chunked.chunk_size(N, num_passes, True, weight)
    low = dtype != torch.float32
    buffers = chunked._allocate(size, num_passes, weight, True)
    held = sum(t.numel() * t.element_size() for t in buffers if t is not None)
    assert held == size * V * (4 * (num_passes + 1) + 2 * num_passes * low)
    assert held <= chunked.CHUNK_BYTES["cpu"] or size == chunked.CHUNK_MULTIPLE["cpu"]

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head_loss(rows.requires_grad_(), teacher, labels.long(), head, weights, weights)
    assert sum(t.numel() * t.element_size() for t in saved) == num_passes * N * H * rows.itemsize

    biggest = LargestTensor()
    with biggest:
        chunked.head_loss_forward(
            rows.detach(), teacher, labels.long(), head, weights, weights, softmax_epilogue_, True
        )
    assert biggest.numel == size * V * (num_passes + 1)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operation under it returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_chunks_are_balanced_and_within_the_budget():
    assert rows_per_chunk(1024, 32768 * 8, 48 << 20, 16) == 176  # six chunks, not five and a rest
    assert rows_per_chunk(8192, 152064 * 10, 1_600_000_000, 128) == 1024
    assert rows_per_chunk(100, 152064 * 10, 1_600_000_000, 128) == 100
    assert rows_per_chunk(10_000, 1 << 40, 1, 16) == 16
    assert rows_per_chunk(0, 8, 100, 16) == 1


def test_offsets_do_not_overflow_32_bits(tmp_path):
    """Program (row 0, k = 1) of a 14,200-row chunk of a 152k vocabulary: element 2,159,308,800.

    The logits are a sparse file: only the two rows that programs touch take any room.
    """
    num_rows, vocabulary = 14_200, 152_064
    assert num_rows * vocabulary > 2**31
    path = tmp_path / "logits"
    path.touch()
    os.truncate(path, 4 * (num_rows + 1) * vocabulary)
    flat = torch.from_file(str(path), shared=True, size=(num_rows + 1) * vocabulary)
    logits = flat.view(num_rows + 1, vocabulary)
    logits[num_rows] = torch.linspace(-3, 3, vocabulary)
    expected = logits[num_rows].double()
    outputs = [torch.zeros(2, num_rows) for _ in range(4)]
    top1, labels = torch.zeros(3, num_rows, dtype=torch.int64), torch.full((num_rows,), 7)
    shape = (num_rows, vocabulary, 1.0, 1.0)
    branches = dict(HAS_TEACHER=False, HAS_BIAS=False, HAS_CAP=False, BLOCK=1 << 15)
    lse, teacher_lse, label_logit, kl = outputs
    kernels._row_statistics[(1, 2)](
        flat, flat, labels, flat, lse, teacher_lse, label_logit, kl, top1, top1[2],
        *shape, -100, **branches,
    )  # fmt: skip
    assert lse[1, 0].double() == pytest.approx(expected.logsumexp(0).item(), rel=1e-6)
    assert top1[1, 0] == vocabulary - 1 and label_logit[1, 0] == logits[num_rows, 7]
    row_weights, coefficients = torch.ones(num_rows), torch.tensor([[1.0, 0.0, 1.0]] * 2)
    kernels._write_dlogits[(1, 2, -(-vocabulary // branches["BLOCK"]))](
        flat, flat, flat, labels, row_weights, coefficients, flat, lse, teacher_lse,
        *shape, **branches,
    )  # fmt: skip
    truth_of_row = expected.softmax(0)
    truth_of_row[7] -= 1
    torch.testing.assert_close(logits[num_rows].double(), truth_of_row, rtol=1e-5, atol=1e-9)


# --- the registered op ------------------------------------------------------------------------


def op_arguments(rows, teacher, labels, weight, needs_grad=True):
    return (
        rows, teacher, labels, weight, None, 1.0, None,
        [1.0] * len(rows), [1.0] * len(rows), "torch", needs_grad,
    )  # fmt: skip


def test_op_is_registered_as_torch_wants_it():
    rows, teacher, labels, weight = (t.float() for t in make(2))
    op = torch.ops.genrecal_ds.head_loss.default
    arguments = op_arguments(rows.requires_grad_(), teacher, labels.long(), weight)
    torch.library.opcheck(op, arguments)


def test_checkpointing_and_tracing_change_nothing():
    rows, teacher, labels, weight = make(1)

    def loss(x):
        return head_loss(x * 2, teacher, labels, Head(weight), (1,), (1,)).loss_sum

    leaf = rows.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    again = torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False)
    (actual,) = torch.autograd.grad(again, leaf)
    assert torch.equal(actual, expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(actual, expected)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(rows=a["rows"][0]), "rows_KNH: "),
        (lambda a: a.update(rows=a["rows"].half()), "head.weight_VH: "),
        (lambda a: a.update(rows=a["rows"].mT.contiguous().mT), "rows_KNH: strides"),
        (lambda a: a.update(teacher=a["teacher"][1:]), "teacher_rows_NH: "),
        (lambda a: a.update(teacher=a["teacher"].double()), "teacher_rows_NH: "),
        (lambda a: a.update(teacher=a["teacher"].to("meta")), "teacher_rows_NH: .*meta"),
        (lambda a: a.update(labels=a["labels"].int()), "labels_N: .*int64"),
        (lambda a: a.update(labels=a["labels"].where(a["labels"] != 3, V)), "labels_N: 507"),
        (lambda a: a.update(labels=a["labels"].where(a["labels"] != 3, -1)), "labels_N: -1"),
        (lambda a: a.update(head=Head(a["head"].weight_VH[:, 1:])), r"head.weight_VH: .*507, 24"),
        (lambda a: a.update(head=Head(a["head"].weight_VH.mT.contiguous().mT)), "strides"),
        (lambda a: a.update(head=a["head"]._replace(bias_V=torch.zeros(3))), "head.bias_V: "),
        (lambda a: a.update(head=Head(a["head"].weight_VH[:0])), "head.weight_VH: .*0, 24"),
        (lambda a: a.update(head=a["head"]._replace(softcap=-1.0)), "head.softcap: -1.0"),
        (lambda a: a.update(ce=(1.0, 1.0)), "ce_weights, kl_weights: 2 and 1"),
        (lambda a: a.update(impl="cuda"), "impl: 'cuda'"),
        (lambda a: a.update(impl="triton"), "impl: triton needs CUDA"),
    ],
)  # fmt: skip
def test_bad_input_is_named(monkeypatch, change, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows, teacher, labels, weight = (t.float() for t in make(1))
    labels = labels.long()
    labels[1] = 3
    given = dict(rows=rows, teacher=teacher, labels=labels, head=Head(weight), ce=(1.0,))
    change(given)
    named = [given.pop(name) for name in ("rows", "teacher", "labels", "head", "ce")]
    with pytest.raises(ValueError, match=message):
        head_loss(*named, (1.0,), **given)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_label_outside_the_vocabulary_gives_nan_where_nobody_looked(monkeypatch, impl):
    """On CUDA labels are not looked at before; the loss must still not go on silently."""
    monkeypatch.setattr("genrecal_ds.ops.head_loss.contract.check_labels", lambda *a: None)
    rows, teacher, labels, weight = make(1)
    for wrong in (V, -1, 10**9):
        labels[1] = wrong
        out, _ = run(rows, teacher, labels, Head(weight), (1,), (1,), impl=impl)
        assert out.ce_KN[0].isnan().nonzero().tolist() == [[1]]
        assert math.isnan(out.loss_sum.item())
