"""token_align against autograd in double precision, every implementation and subset."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genrecal_ds.ops import token_align as package
from genrecal_ds.ops.token_align import kernels, token_align

pytestmark = pytest.mark.unit
B, S, D, A, H = 2, 7, 24, 9, 40
# Two mixed sequences, then two regular ones that share the answer rows (0..4) with them.
SOURCE = [0, 1, -1, -2, 2, -3, 7, 8, 9, -4, -5] + [-6, -7, -1, -2, -8, -3, -9, -4, -5]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)


@pytest.fixture(params=["torch", "triton", "reference"])
def impl(request):
    return request.param


def inverse(source, num_student_rows, num_teacher_rows):
    uses = [[] for _ in range(num_student_rows + num_teacher_rows)]
    for packed, row in enumerate(source):
        uses[row if row >= 0 else num_student_rows - row - 1].append(packed)
    most = max(1, max(map(len, uses), default=1))
    return torch.tensor([u + [-1] * (most - len(u)) for u in uses], dtype=torch.int32)


def make(dtype=torch.float32, source=SOURCE, teacher_rows=A, seed=0):
    torch.manual_seed(seed)
    student, teacher = torch.randn(B, S, D), torch.randn(teacher_rows, H)
    weight, uses = torch.randn(D, H), inverse(source, B * S, teacher_rows)
    maps = (torch.tensor(source, dtype=torch.int32), uses)
    return [t.to(dtype) for t in (student, teacher, weight)], maps


def truth(student, teacher, weight, source, gradient):
    """Row by row, in fp64."""
    student, weight = (t.detach().double().requires_grad_() for t in (student, weight))
    rows = [
        student.flatten(0, 1)[i] if i >= 0 else weight @ teacher[-i - 1].double()
        for i in source.tolist()
    ]
    packed = torch.stack(rows)
    packed.backward(gradient.double())
    return packed.detach(), student.grad, weight.grad


@pytest.mark.parametrize("wants_student, wants_weight", [*product((True, False), repeat=2)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_equals_double_precision(impl, wants_student, wants_weight, dtype, tolerance):
    (student, teacher, weight), (source, uses) = make(dtype)
    gradient = torch.randn(len(source), D).to(dtype)
    packed, d_student, d_weight = truth(student, teacher, weight, source, gradient)
    student.requires_grad_(wants_student)
    weight.requires_grad_(wants_weight)
    out = token_align(student, teacher.requires_grad_(), weight, source, uses, impl=impl)
    assert out.is_contiguous() and out.requires_grad == (wants_student or wants_weight)
    if out.requires_grad:
        out.backward(gradient)
    assert teacher.grad is None
    for actual, expected, wanted in (
        (out, packed, True), (student.grad, d_student, wants_student),
        (weight.grad, d_weight, wants_weight),
    ):  # fmt: skip
        assert (actual is not None) == wanted
        if actual is not None:
            error = (actual.double() - expected).norm() / expected.norm()
            assert error <= tolerance, error
    if wants_student:
        assert student.grad[0, 3:].abs().max() == 0  # rows nobody uses: zeros, not rubbish


@pytest.mark.parametrize("source, teacher_rows", [([0, 3, 5], 0), ([-1, -1, -2], 2), ([], 1)])
def test_one_side_or_no_rows_at_all(impl, source, teacher_rows):
    (student, teacher, weight), (indices, uses) = make(torch.float32, source, teacher_rows)
    out = token_align(
        student.requires_grad_(), teacher, weight.requires_grad_(), indices, uses, impl=impl
    )
    out.sum().backward()
    assert out.shape == (len(source), D) and student.grad.isfinite().all()
    uses_of_teacher = torch.tensor([source.count(-i - 1) for i in range(teacher_rows)])
    expected = (uses_of_teacher[:, None] * teacher).sum(0).expand(D, H)
    torch.testing.assert_close(weight.grad, expected.float())


def test_same_bits_every_time(impl):
    (student, teacher, weight), (source, uses) = make(torch.bfloat16)
    results = []
    for _ in range(2):
        leaf = weight.clone().requires_grad_()
        token_align(student, teacher, leaf, source, uses, impl=impl).float().sin().sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_two_gemms_and_the_shared_rows_are_projected_once():
    (student, teacher, weight), (source, uses) = make()
    with FlopCounterMode(display=False) as counter:
        package._token_align._init_fn(student, teacher, weight, source, uses, "torch")
    assert counter.get_total_flops() == 2 * A * D * H
    gradient = torch.randn(len(source), D)
    with FlopCounterMode(display=False) as counter:
        package._token_align_backward._init_fn(gradient, teacher, uses, True, True, "torch")
    assert counter.get_total_flops() == 2 * A * D * H


@pytest.mark.parametrize("needs, most", [((True, True), 3), ((False, True), 2), ((True, False), 1)])
def test_few_launches_each_way(monkeypatch, needs, most):
    """Kernels and GEMMs, counted where they start: one GEMM and one gather forward."""
    launches = []

    def counting(real, name):
        return lambda *a, **k: launches.append(name) or real(*a, **k)

    (student, teacher, weight), (source, uses) = make()
    monkeypatch.setattr(torch, "mm", counting(torch.mm, "mm"))
    monkeypatch.setattr(kernels, "gather", counting(kernels.gather, "gather"))
    monkeypatch.setattr(kernels, "sum_uses_triton", counting(kernels.sum_uses_triton, "sum"))
    packed = package._token_align._init_fn(student, teacher, weight, source, uses, "triton")
    assert launches == ["mm", "gather"]
    launches.clear()
    package._token_align_backward._init_fn(packed, teacher, uses, *needs, "triton")
    assert len(launches) == most


def test_weight_is_not_kept_for_backward():
    """Under ZeRO-3 it is partitioned again by then: only the teacher's rows and the map stay."""
    (student, teacher, weight), (source, uses) = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = token_align(student, teacher, weight.requires_grad_(), source, uses)
    assert [t.data_ptr() for t in saved] == [teacher.data_ptr(), uses.data_ptr()]
    expected = torch.autograd.grad(out.sum(), weight, retain_graph=True)[0]
    weight.data = torch.empty(0)
    weight.data = torch.full((D, H), torch.nan)
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], expected)


def test_op_is_registered_as_torch_wants_it():
    (student, teacher, weight), (source, uses) = make()
    arguments = (student.requires_grad_(), teacher, weight.requires_grad_(), source, uses, "torch")
    torch.library.opcheck(torch.ops.genrecal_ds.token_align.default, arguments)
    torch.library.opcheck(
        torch.ops.genrecal_ds.token_align_backward.default,
        (torch.randn(len(source), D), teacher, uses, True, True, "torch"),
    )


def test_checkpointing_and_tracing_change_nothing():
    (student, teacher, weight), (source, uses) = make()

    def loss(x, w):
        return token_align(x * 2, teacher, w, source, uses).sin().sum()

    leaves = (student.requires_grad_(), weight.requires_grad_())
    expected = torch.autograd.grad(loss(*leaves), leaves)
    again = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    for actual, value in zip(torch.autograd.grad(again, leaves), expected, strict=True):
        assert torch.equal(actual, value)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, value in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(actual, value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(student=a["student"][0]), "student_hidden_BSD: "),
        (lambda a: a.update(student=a["student"].mT.contiguous().mT), "student_hidden_BSD: stride"),
        (lambda a: a.update(teacher=a["teacher"].half()), "teacher_rows_AH: .*float32"),
        (lambda a: a.update(weight=a["weight"].mT.contiguous()), r"weight_DH: .*\[24, 40\]"),
        (lambda a: a.update(weight=a["weight"].to("meta")), "weight_DH: .*meta"),
        (lambda a: a.update(source=a["source"].long()), "source_P: .*int32"),
        (lambda a: a.update(source=a["source"] + 50), "source_P: .* expected -9 to 13"),
        (lambda a: a.update(source=a["source"] - 9), "source_P: .* expected -9 to 13"),
        (lambda a: a.update(uses=a["uses"][1:]), "uses_RU: "),
        (lambda a: a.update(uses=a["uses"] + 9), "uses_RU: .* expected -1 to 19"),
        (lambda a: a.update(impl="cuda"), "impl: 'cuda'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    (student, teacher, weight), (source, uses) = make()
    given = dict(student=student, teacher=teacher, weight=weight, source=source, uses=uses)
    change(given)
    named = [given.pop(name) for name in ("student", "teacher", "weight", "source", "uses")]
    with pytest.raises(ValueError, match=message):
        token_align(*named, **given)
