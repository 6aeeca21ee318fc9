"""Checkpoints whose tensors transformers renames, splits or joins on load, read row by row."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from genrecal_ds.errors import UserError
from genrecal_ds.models.loading import find_sources
from genrecal_ds.models.tensor_files import Checkpoint

pytestmark = pytest.mark.unit
SIZES = dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)


def molmo2():
    """Three attention matrices as one of unequal parts, two of the MLP as one, two embeddings."""
    return AutoModelForMultimodalLM, AutoConfig.for_model(
        "molmo2",
        text_config={**SIZES, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40,
                     "additional_vocab_size": 8},
        vision_config={**SIZES, "num_key_value_heads": 4, "intermediate_size": 24,
                       "num_hidden_layers": 2, "image_size": [28, 28],
                       "num_position_embeddings": 4},
        adapter_config={**SIZES, "num_key_value_heads": 4, "intermediate_size": 24,
                        "text_hidden_size": 16, "vision_feature_layer": [-1]},
    )  # fmt: skip


def qwen3_moe():
    """Twelve experts' matrices joined into one tensor of three dimensions."""
    return AutoModelForCausalLM, AutoConfig.for_model(
        "qwen3_moe", **SIZES, intermediate_size=24, num_hidden_layers=2, vocab_size=40,
        num_experts=12, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("build", [molmo2, qwen3_moe])
def test_rearranged_tensors_are_found_bit_by_bit(build, tmp_path):
    factory, config = build()
    torch.manual_seed(0)
    factory.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    expected = dict(factory.from_pretrained(tmp_path).named_parameters())
    with torch.device("meta"):
        empty = factory.from_config(config)
    sources = find_sources(empty, Checkpoint(tmp_path))
    assert sources.keys() >= expected.keys()
    assert any(len(source.runs) > 1 for source in sources.values())
    for name, value in expected.items():
        assert torch.equal(sources[name].tensor(), value), name
        third = -(-value.numel() // 3)  # what three ranks read
        ranges = [(r * third, min((r + 1) * third, value.numel())) for r in range(3)]
        shares = [sources[name].flat_range(a, b) for a, b in ranges if a < b]
        assert torch.equal(torch.cat(shares), value.flatten()), name


def test_a_part_that_is_missing_is_refused(tmp_path):
    factory, config = qwen3_moe()
    factory.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop(next(name for name in state if "experts.11.down_proj" in name))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.device("meta"):
        empty = factory.from_config(config)
    with pytest.raises(UserError, match="has shape .*, config.json says"):
        find_sources(empty, Checkpoint(tmp_path))
