"""token_align, head_loss and linear_cross_entropy against autograd in double precision."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from genrecal_ds.ops.head_loss import Head, head_loss, reference
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy
from genrecal_ds.ops.token_align import token_align

pytestmark = pytest.mark.unit
N, H, V = 123, 24, 507


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * V * 3 * 50)  # 50 rows at K = 2
    monkeypatch.setattr("genrecal_ds.ops.linear_cross_entropy.CHUNK_BYTES", 8 * V * 50)


def make(num_passes, bias, seed=0):
    torch.manual_seed(seed)
    rows = torch.randn(num_passes, N, H, dtype=torch.float64)
    teacher = rows[0] + 0.3 * torch.randn(N, H, dtype=torch.float64)
    labels = torch.randint(0, V, (N,))
    labels[::7] = -100
    weight = torch.randn(V, H, dtype=torch.float64)
    return rows, teacher, labels, weight, torch.randn(V, dtype=torch.float64) if bias else None


@pytest.mark.parametrize("bias, scale, softcap", [(False, 1.0, None), (True, 0.7, 5.0)])
@pytest.mark.parametrize("ce, kl", [((1.0,), (1.0,)), ((1.0, 0.5), (2.0, 0.0)), ((0.0,), (1.0,))])
def test_head_loss_equals_double_precision_autograd(ce, kl, bias, scale, softcap):
    rows, teacher, labels, weight, bias_V = make(len(ce), bias)
    truth = rows.clone().requires_grad_()

    def full_logits(x):
        y = (x @ weight.T + (0 if bias_V is None else bias_V)) * scale
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    valid, expected = labels != -100, 0.0
    log_p = full_logits(teacher)[valid].log_softmax(-1)
    for k in range(len(ce)):
        logits = full_logits(truth[k])
        expected_ce = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        log_q = logits[valid].log_softmax(-1)
        expected_kl = kl_div(log_q, log_p, reduction="sum", log_target=True)
        expected = expected + ce[k] * expected_ce + kl[k] * expected_kl
    expected.backward()

    head = Head(weight.float(), None if bias_V is None else bias_V.float(), scale, softcap)
    low = rows.float().requires_grad_()
    out = head_loss(low, teacher.float(), labels, head, ce, kl)
    (3.0 * out.loss_sum).backward()
    torch.testing.assert_close(out.loss_sum.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(low.grad.double(), 3 * truth.grad, rtol=1e-4, atol=2e-4)
    assert low.grad[:, ~valid].abs().max() == 0
    assert out.ce_KN[:, ~valid].abs().max() == 0 and out.kl_KN[:, ~valid].abs().max() == 0


def test_head_loss_of_identical_rows_has_no_kl_and_full_agreement():
    rows, _, labels, weight, _ = make(1, False)
    out = head_loss(rows, rows[0], labels, Head(weight), (1.0,), (1.0,))
    assert out.kl_KN.abs().max() < 1e-5
    assert torch.equal(out.top1_KN[0], labels != -100)


def test_head_loss_takes_no_rows_and_refuses_shapes_that_do_not_fit():
    rows, teacher, labels, weight, _ = make(1, False)
    head = Head(weight)
    empty = rows[:, :0].clone().requires_grad_()
    out = head_loss(empty, teacher[:0], labels[:0], head, (1.0,), (1.0,))
    out.loss_sum.backward()
    assert out.loss_sum == 0 and empty.grad.shape == (1, 0, H)
    with pytest.raises(ValueError, match="do not fit"):
        head_loss(rows, teacher[1:], labels, head, (1.0,), (1.0,))


def test_head_loss_holds_only_a_chunk_of_logits(monkeypatch):
    seen = []
    real = reference.logits
    monkeypatch.setattr(reference, "logits", lambda h, r: seen.append(r.shape[-2]) or real(h, r))
    rows, teacher, labels, weight, _ = make(2, False)
    head_loss(rows.float(), teacher.float(), labels, Head(weight.float()), (1, 1), (1, 1))
    assert max(seen) == 50 and sum(seen) == 2 * N


@pytest.mark.parametrize("train_rows, train_weight", [(True, True), (True, False), (False, True)])
def test_linear_cross_entropy_equals_double_precision_autograd(train_rows, train_weight):
    rows, _, labels, weight, bias = make(1, True)
    row_weights = torch.rand(N, dtype=torch.float64)
    a, w, b = (t.clone().requires_grad_() for t in (rows[0], weight, bias))
    ce = cross_entropy(a @ w.T + b, labels, ignore_index=-100, reduction="none")
    (ce * row_weights).sum().backward()

    low = [t.detach().float() for t in (a, w, b)]
    for tensor, wanted in zip(low, (train_rows, train_weight, train_weight), strict=True):
        tensor.requires_grad_(wanted)
    total, per_row = linear_cross_entropy(low[0], labels, low[1], low[2], row_weights)
    total.backward()
    torch.testing.assert_close(per_row.double(), ce.detach(), rtol=1e-5, atol=1e-5)
    for tensor, truth in zip(low, (a, w, b), strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), truth.grad, rtol=1e-4, atol=2e-4)
        else:
            assert tensor.grad is None


def test_token_align_gathers_projects_and_spares_the_teacher():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    source = torch.tensor([0, 4, -1, -3, 5, -1], dtype=torch.int32)
    packed = token_align(student, teacher, weight, source)
    expected = torch.stack(
        [student[0, 0], student[1, 1], weight @ teacher[0], weight @ teacher[2], student[1, 2],
         weight @ teacher[0]]
    )  # fmt: skip
    torch.testing.assert_close(packed, expected)
    gradient = torch.randn_like(packed)
    packed.backward(gradient)
    assert teacher.grad is None
    # dW = sum over both uses of a shared row
    d_weight = torch.outer(gradient[2] + gradient[5], teacher[0]) + torch.outer(
        gradient[3], teacher[2]
    )
    torch.testing.assert_close(weight.grad, d_weight.detach())
    assert student.grad[0, 1].abs().sum() == 0
    torch.testing.assert_close(student.grad[1, 1], gradient[1])
