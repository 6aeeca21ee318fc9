"""Packed blocks against transformers' own, conversation by conversation; attention backends."""

import copy
import sys
import types

import pytest
import torch
from transformers import AutoConfig

from genrecal_ds.data.batch import collate
from genrecal_ds.data.pair import EncodedChat, Pair
from genrecal_ds.errors import UserError
from genrecal_ds.models.attention import Spans, attend, check_backend
from genrecal_ds.models.packed_blocks import MODEL_TYPES
from genrecal_ds.models.recalibrator import Recalibrator
from genrecal_ds.ops.head_loss import Head, head_loss

pytestmark = pytest.mark.unit
D, H = 32, 24
TINY = dict(hidden_size=D, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, vocab_size=8, head_dim=8,
            # What the Recalibrator's blocks must not take over: they attend fully, drop nothing.
            sliding_window=4, use_sliding_window=True, attention_dropout=0.5)  # fmt: skip
RULES = ({"pixels": "rows"}, {"pixels": "rows"})
# Turns as (question, answer) lengths, of the teacher; one-token answers and one turn among them.
CONVERSATIONS = [[(4, 3), (2, 1), (3, 5)], [(6, 1)], [(1, 2), (5, 4)]]


def config_of(model_type):
    extra = {}
    if "vl" in model_type:
        extra["rope_parameters"] = dict(
            rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]
        )
    return AutoConfig.for_model(model_type, **TINY, **extra)


def pair_of(turns, longer):
    """The student's questions are `longer` than the teacher's by so many tokens."""

    def chat(extra):
        spans, length = [], 0
        for question, answer in turns:
            start = length + question + extra
            spans.append((start, start + answer))
            length = start + answer
        return EncodedChat(torch.ones(length, dtype=torch.int64), tuple(spans), {},
                           {"pixels": torch.ones(1, 2)})  # fmt: skip

    return Pair(teacher=chat(0), student=chat(longer), is_placeholder=False, is_truncated=False)


def batch_of(conversations, with_regular=True):
    pairs = [pair_of(turns, number) for number, turns in enumerate(conversations)]
    return collate(pairs, pairs[0], RULES, with_regular)


def make(model_type, depth=2, std=0.3):
    """The same Recalibrator over transformers' blocks and over packed ones, in fp64."""
    torch.manual_seed(0)
    theirs = Recalibrator(config_of(model_type), H, depth, blocks="transformers").double()
    theirs.initialize(std, torch.rand(H) + 0.5)
    with torch.no_grad():  # norms and biases off their neutral values
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = Recalibrator(config_of(model_type), H, depth, blocks="packed").double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(batch):
    student = batch.student.inputs.input_ids
    return (
        torch.randn(*student.shape, D, dtype=torch.float64, requires_grad=True),
        torch.randn(len(batch.teacher.rows_A), H, dtype=torch.float64),
        batch.teacher.layout,
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equal_transformers_blocks(model_type, depth):
    theirs, ours = make(model_type, depth)
    inputs = inputs_of(batch_of(CONVERSATIONS))
    results = []
    for module in (theirs, ours):
        rows = module(*inputs)
        gradients = torch.autograd.grad(rows.sin().sum(), [inputs[0], *module.parameters()])
        results.append([rows.detach(), *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_equals_padded_in_fp32_from_the_rows_to_the_loss(model_type):
    """Loss and every gradient, through the teacher's head, to 1e-6 of their norm."""
    torch.manual_seed(1)
    hidden, teacher_rows, layout = inputs_of(batch_of(CONVERSATIONS))
    hidden = hidden.detach().float().requires_grad_()
    num_rows = len(layout.loss_rows) // 2
    weight, targets = torch.randn(50, H), torch.randn(num_rows, H)
    labels = torch.randint(0, 50, (num_rows,))
    results = []
    for module in make(model_type, std=0.1):
        rows = module.float()(hidden, teacher_rows.float(), layout).unflatten(0, (2, num_rows))
        loss = head_loss(rows, targets, labels, Head(weight), [1.0, 1.0], [1.0, 1.0]).loss_sum
        results.append([loss.detach(), *torch.autograd.grad(loss, [hidden, *module.parameters()])])
    for padded, packed in zip(*results, strict=True):
        assert (packed - padded).norm() <= 1e-6 * padded.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2_vl_text"])
def test_packed_equals_one_conversation_at_a_time(model_type, packed):
    """In fp32: losses and gradients, multi-turn and one-token answers among them."""
    module = make(model_type)[packed].float()
    together = batch_of(CONVERSATIONS)
    hidden, teacher_rows, layout = (
        t.float().detach().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
        for t in inputs_of(together)
    )
    rows = module(hidden, teacher_rows, layout)
    (gradient,) = torch.autograd.grad(rows.sin().sum(), hidden)
    half, seen, expected, expected_gradient = len(rows) // 2, [0, 0], [[], []], []
    answers = [sum(a for _, a in turns) for turns in CONVERSATIONS]
    questions = [sum(q for q, _ in turns) for turns in CONVERSATIONS]
    for b, turns in enumerate(CONVERSATIONS):
        alone = collate([pair_of(turns, b)], pair_of(turns, b), RULES, True)
        length = alone.student.inputs.input_ids.shape[1]
        part = hidden[b : b + 1, :length].detach().requires_grad_()
        own_rows = torch.cat([
            teacher_rows[seen[0] : seen[0] + answers[b]],
            teacher_rows[sum(answers) + seen[1] : sum(answers) + seen[1] + questions[b]],
        ])  # fmt: skip
        seen = [seen[0] + answers[b], seen[1] + questions[b]]
        out = module(part, own_rows, alone.teacher.layout)
        expected_gradient.append(torch.autograd.grad(out.sin().sum(), part)[0])
        for k, rows_of_pass in enumerate(out.detach().chunk(2)):
            expected[k].append(rows_of_pass)
    torch.testing.assert_close(rows[:half], torch.cat(expected[0]), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(rows[half:], torch.cat(expected[1]), rtol=1e-5, atol=2e-6)
    for b, own in enumerate(expected_gradient):
        torch.testing.assert_close(gradient[b, : own.shape[1]], own[0], rtol=1e-4, atol=1e-5)


def test_the_last_block_works_on_the_loss_rows_alone():
    _, ours = make("llama")
    hidden, teacher_rows, layout = inputs_of(batch_of(CONVERSATIONS))
    seen = {}
    for number, layer in enumerate(ours.blocks.layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp"):
            layer.get_submodule(name).register_forward_hook(
                lambda _, args, out, key=(number, name): seen.update({key: args[0].shape[0]})
            )
    ours(hidden, teacher_rows, layout)
    total, loss = len(layout.source_P), len(layout.loss_rows)
    assert {count for (number, _), count in seen.items() if number == 0} == {total}
    assert seen[1, "self_attn.k_proj"] == total > loss
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
        assert seen[1, name] == loss


def test_another_family_is_refused():
    config = AutoConfig.for_model("gemma2", **TINY)
    assert Recalibrator(config, H).packed_attention is None
    with pytest.raises(UserError, match="recalibrator.blocks: packed is not known for gemma2"):
        Recalibrator(config, H, blocks="packed")
    with pytest.raises(UserError, match="varlen needs packed blocks"):
        Recalibrator(config, H, attention="varlen")
    assert Recalibrator(config_of("qwen2"), H).packed_attention == "sdpa"


def spans_of(query_lengths, key_lengths):
    cu = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (query_lengths, key_lengths)]
    return Spans(*cu, max(query_lengths), max(key_lengths))


def test_sdpa_over_spans_equals_a_loop():
    torch.manual_seed(0)
    lengths = ([2, 1, 3], [5, 4, 3])
    q, k, v = (torch.randn(sum(n), heads, 8, dtype=torch.float64)
               for n, heads in ((lengths[0], 4), (lengths[1], 2), (lengths[1], 2)))  # fmt: skip
    out = attend(q, k, v, spans_of(*lengths), 0.3, "sdpa")
    q_start = k_start = 0
    for n_q, n_k in zip(*lengths, strict=True):
        for i in range(n_q):
            last = k_start + n_k - n_q + i + 1
            for head in range(4):
                keys, values = (t[k_start:last, head // 2] for t in (k, v))
                weights = (keys @ q[q_start + i, head] * 0.3).softmax(0)
                torch.testing.assert_close(out[q_start + i, head], weights @ values)
        q_start, k_start = q_start + n_q, k_start + n_k


@pytest.fixture
def recorded(monkeypatch):
    """Fakes of both fused kernels: they record their arguments and answer through sdpa."""
    calls = []

    def answer(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        spans = Spans(cu_q, cu_q if cu_k is cu_q else cu_k, max_q, max_k)
        return attend(q, k, v, spans, scale, "sdpa")

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal):
        calls.append(dict(name="flash", q=q, k=k, cu_q=cu_q, cu_k=cu_k, causal=causal))
        return answer(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        calls.append(dict(name="varlen", q=q, k=k, cu_q=cu_q, cu_k=cu_k,
                          causal=window_size == (-1, 0)))  # fmt: skip
        return answer(q, k, v, cu_q, cu_k, max_q, max_k, scale)

    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    return calls


@pytest.mark.parametrize("backend, key_heads", [("flash", 2), ("varlen", 4)])
def test_fused_backends_are_called_as_they_want(recorded, backend, key_heads):
    """Not run on a GPU here: shapes, dtypes, int32 offsets and causality as their docs say."""
    _, ours = make("qwen3")
    ours = ours.bfloat16()
    fused = copy.deepcopy(ours)
    fused.packed_attention = backend
    hidden, teacher_rows, layout = inputs_of(batch_of(CONVERSATIONS))
    inputs = (hidden.detach().bfloat16(), teacher_rows.bfloat16(), layout)
    torch.testing.assert_close(fused(*inputs), ours(*inputs))
    total, loss = len(layout.source_P), len(layout.loss_rows)
    assert [call["name"] for call in recorded] == [backend, backend]
    first, last = recorded
    assert first["q"].shape == (total, 4, 8) and first["k"].shape == (total, key_heads, 8)
    assert last["q"].shape == (loss, 4, 8)
    for call in recorded:
        assert call["causal"] and call["q"].dtype == call["k"].dtype == torch.bfloat16
        assert call["cu_q"].dtype == call["cu_k"].dtype == torch.int32
        assert call["cu_q"][-1] == len(call["q"]) and call["cu_k"][-1] == len(call["k"])


def test_an_explicit_backend_never_falls_back():
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    check_backend("sdpa", cpu, torch.float32)
    with pytest.raises(UserError, match="varlen needs a CUDA device and bf16"):
        check_backend("varlen", cpu, bf16)
    with pytest.raises(UserError, match="varlen needs a CUDA device and bf16"):
        check_backend("varlen", torch.device("cuda"), torch.float32)
    with pytest.raises(UserError, match="pip install flash-attn"):
        check_backend("flash", torch.device("cuda"), bf16)
