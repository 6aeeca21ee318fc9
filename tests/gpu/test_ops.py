"""On a CUDA machine: the compiled kernels against fp64, without a wait for the device.

Needs torch, triton and transformers only: python3 -m pytest tests/gpu/test_ops.py
"""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from genrecal_ds.models.token_bytes import byte_vocabulary
from genrecal_ds.ops.gemm import scaled
from genrecal_ds.ops.head_loss import Head, head_loss
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy
from genrecal_ds.ops.linear_distance import linear_distance
from genrecal_ds.ops.next_byte import Boundaries, next_byte_kl, next_byte_log_mass
from genrecal_ds.ops.token_align import token_align

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N, H, V = 1507, 512, 50_252
CUDA = torch.device("cuda")


@pytest.fixture
def numbers():
    """Peaked logits, and student rows near the teacher's."""
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=CUDA)

    weight, teacher = normal(V, H) / H**0.5, normal(N, H)
    teacher *= 35.0 / (teacher @ weight.T).abs().max()
    rows = teacher + 0.03 * teacher.std() * normal(2, N, H)
    labels = torch.randint(0, V, (N,), generator=generator, device=CUDA)
    labels[::7] = -100
    return rows, teacher, labels, weight


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-3)])
def test_head_loss(numbers, impl, softcap, dtype, tolerance):
    rows, teacher, labels, weight = (t.to(dtype) if t.is_floating_point() else t for t in numbers)
    head = Head(weight, torch.linspace(-1, 1, V, device=CUDA).to(dtype), 0.9, softcap)

    def logits(x):
        y = (x.double() @ weight.double().T + head.bias_V.double()) * head.scale
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    leaf, valid = rows.double().requires_grad_(), labels != -100
    log_p = logits(teacher)[valid].log_softmax(-1)
    for k in range(2):
        student = logits(leaf[k])
        loss = cross_entropy(student, labels, reduction="sum") + kl_div(
            student[valid].log_softmax(-1), log_p, reduction="sum", log_target=True
        )
        loss.backward()
    own = rows.clone().requires_grad_()
    out = head_loss(own, teacher, labels, head, [1.0, 1.0], [1.0, 1.0], impl=impl)
    out.loss_sum.backward()
    assert error(own.grad, leaf.grad) < tolerance


def test_linear_cross_entropy_with_a_trained_head(numbers):
    rows, _, labels, weight = numbers
    low, low_weight = rows[0].bfloat16(), weight.bfloat16()
    true, true_weight = low.double().requires_grad_(), low_weight.double().requires_grad_()
    cross_entropy(true @ true_weight.T, labels, reduction="sum").backward()
    low.requires_grad_()
    low_weight.requires_grad_()
    total, _ = linear_cross_entropy(low, labels, Head(low_weight), torch.ones(N, device=CUDA))
    total.backward()
    assert error(low.grad, true.grad) < 4e-3 and error(low_weight.grad, true_weight.grad) < 4e-3


def test_linear_distance_with_a_trained_head(numbers):
    rows, teacher, _, weight = numbers
    low, low_weight = rows[0].bfloat16(), weight.bfloat16()
    targets = (teacher @ weight.T).softmax(-1)

    def to_targets(logits, part):
        return -(targets[part].to(logits.dtype) * logits.log_softmax(-1)).sum(-1)

    true, true_weight = low.double().requires_grad_(), low_weight.double().requires_grad_()
    to_targets(true @ true_weight.T, slice(None)).sum().backward()
    low.requires_grad_()
    low_weight.requires_grad_()
    total, _ = linear_distance(low, Head(low_weight), to_targets)
    total.backward()
    assert error(low.grad, true.grad) < 1e-2 and error(low_weight.grad, true_weight.grad) < 1e-2


def test_a_gradient_is_scaled_without_a_copy_of_its_own_dtype():
    sums = torch.randn(4096, 4096, device=CUDA)
    factor = torch.tensor(0.37, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rounded = scaled(sums, factor, torch.bfloat16)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2 * rounded.nbytes  # fp32's is twice
    assert torch.equal(rounded, (sums * factor).bfloat16())


@pytest.mark.parametrize("narrow", [16, 1])
def test_next_byte_kl(narrow, monkeypatch):
    monkeypatch.setattr("genrecal_ds.ops.next_byte.NARROW", narrow)
    words = [bytes([byte]) for byte in range(256)]
    words += [blank + word for blank in (b"", b" ") for word in map(b"%x".__mod__, range(16, 9000))]
    pieces = [*dict.fromkeys(words), None]
    end = len(pieces) - 1
    asked = [(row, 97 * row, d) for row in range(180) for d in range(len(pieces[97 * row]))]
    torch.manual_seed(0)
    teacher, student = (3 * torch.randn(180, len(pieces), dtype=torch.float64) for _ in range(2))
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        table = byte_vocabulary(pieces, end, len(pieces), torch.device(device))
        at = Boundaries(*torch.tensor(asked, device=device).T)
        theirs, ours = (logits.to(device, dtype) for logits in (teacher, student))
        mass = next_byte_log_mass(ours.requires_grad_(), at, table)
        kl = next_byte_kl(next_byte_log_mass(theirs, at, table), mass)
        results.append((kl.detach().cpu(), torch.autograd.grad(kl.sum(), ours)[0].cpu()))
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) < 1e-4


def test_offsets_beyond_32_bits():
    """15,000 rows of a 152k vocabulary in one chunk: 9 GB of logits, 2.3e9 elements."""
    from genrecal_ds.ops.head_loss.epilogue import Chunk, Coefficients
    from genrecal_ds.ops.head_loss.kernels import softmax_epilogue_triton_

    rows, vocabulary = 15_000, 152_064
    logits = torch.zeros(1, rows, vocabulary, device=CUDA)
    logits[0, -1] = torch.linspace(-3, 3, vocabulary, device=CUDA)
    last = logits[0, -1].double().clone()
    labels = torch.full((rows,), 5, device=CUDA)
    chunk = Chunk(
        logits, None, labels, torch.ones(rows, device=CUDA), [Coefficients(1.0, 0.0, 1.0)],
        Head(torch.empty(vocabulary, 1, device=CUDA)), True, logits.view(rows, vocabulary),
    )  # fmt: skip
    stats = softmax_epilogue_triton_(chunk)
    torch.testing.assert_close(stats.lse_Kn[0, -1].double(), last.logsumexp(0), rtol=1e-6, atol=0)
    expected = last.softmax(0)
    expected[5] -= 1
    torch.testing.assert_close(logits[0, -1].double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_token_align(dtype, tolerance):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 100, 320, device=CUDA), torch.randn(150, 512, device=CUDA)
    weight = torch.randn(320, 512, device=CUDA) / 512**0.5
    order = torch.randperm(400)[:250]
    answers = -1 - torch.arange(150)
    source = torch.cat([order, answers, answers]).int()
    row = torch.where(source >= 0, source, 399 - source)
    uses = torch.full((550, 2), -1, dtype=torch.int32)
    for packed, r in enumerate(row.tolist()):
        uses[r, 0 if uses[r, 0] < 0 else 1] = packed
    source, uses = source.cuda(), uses.cuda()
    results = []
    for kind, impl in ((torch.float64, "reference"), (dtype, "triton")):
        inputs = [t.to(dtype).to(kind) for t in (student, teacher, weight)]
        inputs[0].requires_grad_()
        inputs[2].requires_grad_()
        packed = token_align(*inputs, source, uses, impl=impl)
        packed.backward(packed.detach())
        results.append((packed.detach(), inputs[0].grad, inputs[2].grad))
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected.double()) < tolerance


def test_nothing_waits_for_the_device(numbers):
    rows, teacher, labels, weight = numbers
    source = torch.arange(N, device=CUDA, dtype=torch.int32)
    uses = source[:, None].clone()

    def step():
        leaf = rows.clone().requires_grad_()
        head_loss(leaf, teacher, labels, Head(weight), [1.0, 0.5], [1.0, 1.0]).loss_sum.backward()
        student = rows[:1].clone().requires_grad_()
        proj = torch.ones(H, H, device=CUDA, requires_grad=True)
        token_align(student, teacher[:0], proj, source, uses).sum().backward()

    step()  # compiles, and copies the weights of the loss once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_varlen_attention_equals_sdpa():
    from genrecal_ds.models.attention import Spans, attend

    torch.manual_seed(0)
    lengths = ([20, 7, 64], [90, 7, 130])
    q, k, v = (
        torch.randn(sum(n), heads, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for n, heads in ((lengths[0], 8), (lengths[1], 2), (lengths[1], 2))
    )
    cu = [torch.tensor([0, *n]).cumsum(0).int().cuda() for n in lengths]
    results = []
    for backend in ("sdpa", "varlen"):
        out = attend(q, k, v, Spans(*cu, 64, 130), 0.125, backend)
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))])
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected.double()) < 1e-2
