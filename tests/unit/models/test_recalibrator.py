"""The Recalibrator's size, its attention, and what it is built from."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from genrecal_ds.data.recalibrator_input import RecalibratorInput, Turns
from genrecal_ds.models.recalibrator import (
    Recalibrator,
    block_config,
    load_recalibrator,
    save_recalibrator,
)

pytestmark = pytest.mark.unit
FACTS = json.loads((Path(__file__).parents[2] / "facts/text_configs.json").read_text())


def text_config(name, **overrides):
    facts = {**FACTS[name], **overrides}
    return AutoConfig.for_model(facts.pop("model_type"), **facts)


TINY = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
TINY_QWEN = dict(
    TINY, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
)


@pytest.mark.parametrize(
    "name, parameters", [("qwen2-vl-7b", 524_844_032), ("internvl2.5-8b", 503_341_056)]
)
def test_size_equals_the_papers(name, parameters):
    with torch.device("meta"):
        recalibrator = Recalibrator(text_config(name), teacher_width=8192)
    assert sum(p.numel() for p in recalibrator.parameters()) == parameters


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_is_configurable(depth):
    with torch.device("meta"):
        recalibrator = Recalibrator(text_config("internvl2.5-8b"), 8192, depth)
    assert len(recalibrator.blocks.layers) == depth


def test_rope_has_the_students_theta_and_no_scaling():
    rope = block_config(text_config("internvl2.5-8b"), 2).rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 1000000.0}
    assert block_config(text_config("qwen2-vl-7b"), 2).rope_parameters["mrope_section"]


@pytest.fixture(params=["packed", "transformers"])
def blocks(request):
    return request.param


def tiny(name="qwen2-vl-7b", blocks="auto", positions="new"):
    torch.manual_seed(0)
    config = text_config(name, **(TINY_QWEN if name.startswith("qwen") else TINY))
    recalibrator = Recalibrator(config, teacher_width=24, blocks=blocks, positions=positions)
    norm = torch.rand(24) + 0.5
    recalibrator.initialize(0.3, norm)
    assert torch.equal(recalibrator.norm.weight, norm)
    return recalibrator


def pack(lengths, own_positions=None):
    """All rows from the student, each sequence alone, every row a loss row."""
    total = sum(lengths)
    sequence = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    source = torch.arange(total, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    turns = Turns(torch.arange(total), cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    return RecalibratorInput(
        source, source[:, None].clone(), sequence, positions,
        positions if own_positions is None else own_positions, torch.arange(total), cu_seqlens,
        turns, len(lengths), max(lengths),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "internvl2.5-8b"])
def test_conversations_do_not_see_each_other_nor_the_padding(name, blocks):
    recalibrator, lengths = tiny(name, blocks), [5, 9, 2]
    hidden, no_teacher = torch.randn(1, sum(lengths), 32), torch.zeros(0, 24)
    together = recalibrator(hidden, no_teacher, pack(lengths))
    alone = [
        recalibrator(part, no_teacher, pack([part.shape[1]])) for part in hidden.split(lengths, 1)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "internvl2.5-8b"])
def test_attention_is_causal_and_positions_matter(name, blocks):
    recalibrator = tiny(name, blocks)
    hidden, no_teacher = torch.randn(1, 8, 32), torch.zeros(0, 24)
    before = recalibrator(hidden, no_teacher, pack([8]))
    changed = hidden.clone()
    changed[0, 5] += 1.0
    after = recalibrator(changed, no_teacher, pack([8]))
    assert torch.equal(before[:5], after[:5])
    assert (before[5:] - after[5:]).abs().amax(-1).min() > 1e-4
    swapped = hidden[:, [1, 0, *range(2, 8)]]  # without positions the last row would not notice
    assert (recalibrator(swapped, no_teacher, pack([8]))[-1] - before[-1]).abs().max() > 1e-4


def test_blocks_follow_the_qwen_block_formula(blocks):
    """One block, written out from its weights, in double precision."""
    recalibrator = tiny("internvl2.5-8b", blocks).double()
    hidden = torch.randn(1, 6, 32, dtype=torch.float64)
    out = recalibrator(hidden, torch.zeros(0, 24, dtype=torch.float64), pack([6]))
    x = hidden[0]
    for layer in recalibrator.blocks.layers:
        x = x + attention(layer.self_attn, rms(x, layer.input_layernorm.weight))
        y = rms(x, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        gate = torch.nn.functional.silu(y @ mlp.gate_proj.weight.T)
        x = x + (gate * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    expected = rms(x @ recalibrator.proj_post.weight.T, recalibrator.norm.weight)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def rms(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attention(module, x, heads=4, groups=2, theta=1e6):
    length, width = x.shape
    size = width // heads
    q, k, v = (
        (x @ projection.weight.T).view(length, -1, size).transpose(0, 1)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    angles = torch.arange(length).double()[:, None] * theta ** (
        -torch.arange(0, size, 2).double() / size
    )
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def rotate(t):
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat([-second, first], -1) * sin

    q, k = rotate(q), rotate(k).repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    mixed = scores.softmax(-1) @ v.repeat_interleave(groups, 0)
    return mixed.transpose(0, 1).reshape(length, width) @ module.o_proj.weight.T


def test_saved_recalibrator_loads_bit_equal_and_another_shape_is_refused(tmp_path):
    first = tiny()
    save_recalibrator(first.state_dict(), tmp_path, {"depth": 2})
    second = tiny()
    second.initialize(0.1, None)
    load_recalibrator(second, tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    other = Recalibrator(text_config("qwen2-vl-7b", **TINY_QWEN), teacher_width=16)
    with pytest.raises(Exception, match="another pair or depth"):
        load_recalibrator(other, tmp_path)


@pytest.mark.parametrize("name", ["qwen2-vl-7b", "internvl2.5-8b"])
def test_own_positions_are_those_of_the_blocks(name):
    """The paper's ablation without NPE: both kinds of blocks turn rows by the places given."""
    lengths, own = [5, 3], torch.tensor([0, 1, 7, 8, 9, 4, 5, 6])
    hidden, no_teacher = torch.randn(1, 8, 32), torch.zeros(0, 24)
    found = {
        blocks: tiny(name, blocks, "own")(hidden, no_teacher, pack(lengths, own))
        for blocks in ("packed", "transformers")
    }
    torch.testing.assert_close(found["packed"], found["transformers"], rtol=1e-4, atol=1e-5)
    new = tiny(name, "packed")(hidden, no_teacher, pack(lengths, own))
    assert (found["packed"] - new)[2:5].abs().max() > 1e-3
    # RoPE knows distances alone, and those of the second sequence are as they were.
    torch.testing.assert_close(found["packed"][5:], new[5:], rtol=1e-4, atol=1e-5)
