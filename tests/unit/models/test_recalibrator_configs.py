"""Blocks from any student's config: as training builds them, against formulas written out here."""

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoConfig
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from genrecal_ds.models.packed_blocks import _rotate
from genrecal_ds.models.recalibrator import Recalibrator, block_config
from genrecal_ds.models.vlm import VLM
from tests.unit.models.test_recalibrator import pack

pytestmark = pytest.mark.unit
D, H, HEADS, GROUPS, E = 32, 24, 4, 2, 8
SIZES = dict(hidden_size=D, intermediate_size=48, num_attention_heads=HEADS, vocab_size=40,
             num_key_value_heads=GROUPS, head_dim=E, num_hidden_layers=4, pad_token_id=0,
             bos_token_id=1, eos_token_id=2, max_position_embeddings=64)  # fmt: skip
LENGTHS = [9, 7]
NO_TEACHER = torch.zeros(0, H)


def config_of(model_type, **keys):
    return AutoConfig.for_model(model_type, **SIZES | keys)


def make(config, blocks="auto", depth=2):
    torch.manual_seed(0)
    recalibrator = Recalibrator(config, H, depth, blocks=blocks)
    recalibrator.initialize(0.3, torch.rand(H) + 0.5)
    return recalibrator


@pytest.mark.parametrize("blocks", ["auto", "transformers"])
@pytest.mark.parametrize("row", [
    "llama", "mistral", "qwen2", "qwen3", "internlm3", "phi3", "gemma2", "gemma3", "qwen2_vl",
    "qwen3_vl", "internvl", "llava", "paligemma", "minicpmv4_6",
])  # fmt: skip
def test_a_student_with_the_recipes_defaults_gives_its_blocks(zoo, row, blocks):
    """pack: null makes our attention the student's, which asks each layer for its samples."""
    student = VLM.from_config(zoo(row), torch.float32, pack=None)
    recalibrator = make(student.text_config, blocks).train()
    hidden = torch.randn(1, sum(LENGTHS), student.text_config.hidden_size, requires_grad=True)
    rows = recalibrator(hidden, NO_TEACHER, pack(LENGTHS))
    alone = [recalibrator(part, NO_TEACHER, pack([part.shape[1]]))
             for part in hidden.split(LENGTHS, 1)]  # fmt: skip
    torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(rows[3].sum(), hidden, retain_graph=True)
    assert gradient[0, :4].any(-1).all() and not gradient[0, 4:].any()  # causal
    rows.sin().sum().backward()
    for name, parameter in recalibrator.named_parameters():
        if name != "proj_pre.weight":  # there are no teacher's rows here
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert hidden.grad.isfinite().all()


PHI3 = dict(partial_rotary_factor=0.5)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.5] * 4, long_factor=[9.0] * 4,
                original_max_position_embeddings=8)  # fmt: skip
QWEN35 = dict(
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5,
                         mrope_section=[1, 1, 0]),
)  # fmt: skip
STRETCHED = [
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="dynamic", factor=4.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4),
    dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=8),
]  # fmt: skip


def rope(**keys):
    return dict(rope_parameters=dict(rope_theta=1e4, **keys))


@pytest.mark.parametrize("blocks", ["auto", "transformers"])
@pytest.mark.parametrize("model_type, keys, turned", [
    ("phi3", {}, E), ("phi3", PHI3, E // 2),
    ("phi3", rope(rope_type="default", partial_rotary_factor=0.5), E // 2),
    ("phi3", dict(rope_parameters=LONGROPE), E),  # longer than original_max_position_embeddings
    ("qwen3_5_text", QWEN35, E // 2),
    ("internlm3", {}, E),
    ("llama", PHI3, E),  # transformers' Llama has no such thing, so neither have its blocks
    *[("llama", rope(**keys), E) for keys in STRETCHED],
    ("qwen3", rope(**STRETCHED[2]), E),
])  # fmt: skip
def test_blocks_are_plain_rope_in_the_share_that_the_family_turns(model_type, keys, turned, blocks):
    """Rows and gradients against the formula in double precision."""
    recalibrator = make(config_of(model_type, **keys), blocks).double()
    hidden = torch.randn(1, sum(LENGTHS), D, dtype=torch.float64, requires_grad=True)
    rows = recalibrator(hidden, NO_TEACHER.double(), pack(LENGTHS))
    expected = torch.cat([
        reference(recalibrator, part[0], model_type, turned) for part in hidden.split(LENGTHS, 1)
    ])  # fmt: skip
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    wanted = [p for name, p in recalibrator.named_parameters() if name != "proj_pre.weight"]
    for own, true in zip(
        torch.autograd.grad(rows.sin().sum(), [hidden, *wanted]),
        torch.autograd.grad(expected.sin().sum(), [hidden, *wanted]),
        strict=True,
    ):
        assert (own - true).norm() <= 1e-5 * true.norm()


def reference(recalibrator, x, model_type, turned):
    """A sequence's rows [L, D], block by block from the weights."""
    config = recalibrator.blocks.config
    plus = 1.0 if model_type == "qwen3_5_text" else 0.0  # its norms multiply by 1 + weight

    def normed(rows, norm):
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return rows * scale * (norm.weight + plus)

    for layer in recalibrator.blocks.layers:
        x = x + attention(layer.self_attn, normed(x, layer.input_layernorm), normed, turned)
        y, mlp = normed(x, layer.post_attention_layernorm), layer.mlp
        if hasattr(mlp, "gate_up_proj"):
            gate, up = (y @ mlp.gate_up_proj.weight.T).chunk(2, -1)
        else:
            gate, up = y @ mlp.gate_proj.weight.T, y @ mlp.up_proj.weight.T
        x = x + (silu(gate) * up) @ mlp.down_proj.weight.T
    rows = x @ recalibrator.proj_post.weight.T
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    return rows * scale * recalibrator.norm.weight


def attention(module, x, normed, turned, theta=1e4):
    length, open_gate = len(x), None
    if hasattr(module, "qkv_proj"):
        q, k, v = (x @ module.qkv_proj.weight.T).split([HEADS * E, GROUPS * E, GROUPS * E], -1)
    else:
        q, k, v = (x @ p.weight.T for p in (module.q_proj, module.k_proj, module.v_proj))
    if q.shape[-1] == 2 * HEADS * E:  # Qwen3.5: a gate beside each head's query
        q, open_gate = q.view(length, HEADS, 2 * E).chunk(2, -1)
    q, k, v = (t.reshape(length, -1, E) for t in (q, k, v))
    if hasattr(module, "q_norm"):
        q, k = normed(q, module.q_norm), normed(k, module.k_norm)
    angles = torch.arange(length).double()[:, None] * theta ** (
        -torch.arange(0, turned, 2).double() / turned
    )

    def rotated(t):
        first, second, rest = t.tensor_split([turned // 2, turned], -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    q, k, v = (t.transpose(0, 1) for t in (rotated(q), rotated(k), v))
    k, v = (t.repeat_interleave(HEADS // GROUPS, 0) for t in (k, v))
    scores = (q @ k.transpose(1, 2) / E**0.5).masked_fill(
        torch.ones(length, length).triu(1).bool(), float("-inf")
    )
    mixed = (scores.softmax(-1) @ v).transpose(0, 1)
    mixed = mixed if open_gate is None else mixed * open_gate.sigmoid()
    return mixed.reshape(length, -1) @ module.o_proj.weight.T


@pytest.mark.parametrize("turned", [2, 4, 8])
def test_packed_rows_turn_in_part_as_transformers_turns_them(turned):
    torch.manual_seed(0)
    rows_PhE = torch.randn(11, HEADS, E, dtype=torch.float64)
    angles = torch.randn(11, turned // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    theirs, _ = apply_rotary_pos_emb(rows_PhE, rows_PhE, cos, sin)
    torch.testing.assert_close(_rotate(rows_PhE, cos, sin), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_type, keys", [
    ("phi3", dict(resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)),
    ("gemma2", dict(attention_dropout=0.5)),
    ("starcoder2", dict(residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5)),
])  # fmt: skip
def test_nothing_is_dropped_in_training(model_type, keys):
    recalibrator = make(config_of(model_type, **keys), "transformers").train()
    hidden = torch.randn(1, sum(LENGTHS), D)
    training = recalibrator(hidden, NO_TEACHER, pack(LENGTHS))
    assert torch.equal(training, recalibrator.eval()(hidden, NO_TEACHER, pack(LENGTHS)))


@pytest.mark.parametrize("model_type, name", [
    ("llama", "rms_norm_eps"), ("lfm2", "norm_eps"), ("cohere2", "layer_norm_eps"),
    ("starcoder2", "norm_epsilon"),
])  # fmt: skip
def test_the_norm_has_the_eps_of_the_config_by_any_name(model_type, name):
    with torch.device("meta"):
        recalibrator = Recalibrator(config_of(model_type, **{name: 0.25}), H)
    assert recalibrator.norm.eps == 0.25


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "qwen2", "gemma2", "gemma3_text"])
def test_a_sliding_students_blocks_see_everything(model_type):
    """One block, a window of 4: the last of 16 rows follows from the first."""
    config = config_of(model_type, sliding_window=4, use_sliding_window=True, max_window_layers=0)
    recalibrator = make(config, "transformers", depth=1)
    hidden = torch.randn(1, 16, D, requires_grad=True)
    last = recalibrator(hidden, NO_TEACHER, pack([16]))[-1]
    (gradient,) = torch.autograd.grad(last.sin().sum(), hidden)
    assert (gradient[0].norm(dim=-1) > 1e-5).all()


def test_the_students_own_config_stays_as_it_is():
    config = config_of("phi3", **PHI3, resid_pdrop=0.5)
    before = config.to_dict()
    block_config(config, 2)
    assert config.to_dict() == before
