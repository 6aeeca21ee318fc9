"""Tiny models of every text-only class of the installed transformers, no class treated apart.

    python -m tests.zoo.any_text [MODEL_TYPE ...]

Prints a line a class: whether it loads and passes the checks of a load, or why it does not.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.zoo.saving import save_text, template
from tests.zoo.tokenizers import Kind, train

WIDTH, LAYERS, HEADS = 32, 2, 4
LARGEST = 50_000_000  # parameters
# Sizes by the names that configs give them. A config takes those that it has.
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH, "dim": WIDTH,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS, "n_layers": LAYERS,
    "num_attention_heads": HEADS, "n_head": HEADS, "num_heads": HEADS, "n_heads": HEADS,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "ffn_dim": 64,
    "ffn_hidden_size": 64, "n_inner": 64, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_k": 2, "moe_topk": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16, "max_position_embeddings": 512, "n_positions": 512,
    "n_ctx": 512, "max_seq_len": 512, "sliding_window": 8, "rotary_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    "pad_token_id": None,
}  # fmt: skip


def text_types() -> list[str]:
    """Every model_type that AutoModelForCausalLM knows and no factory of VLMs does."""
    return sorted(
        set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    )


def tiny_config(model_type: str, vocab_size: int) -> dict[str, Any]:
    """The keys of SIZES that a config has, and its lists of layers cut to as many."""
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    known = {key: value for key, value in SIZES.items() if key in defaults}
    for key, value in defaults.items():
        if isinstance(value, list) and len(value) == defaults.get("num_hidden_layers", -1):
            known[key] = [*value[: LAYERS - 1], value[-1]]  # one of each kind, most likely
    if "kv_lora_rank" in known:  # compressed keys have as many heads as queries
        known["num_key_value_heads"] = HEADS
    return {**known, "vocab_size": vocab_size}


def write(model_type: str, folder: Path, kind: Kind = "byte_bpe") -> Path:
    """Write a tiny random model of a class as a Hugging Face folder.

    Raises ValueError for a class that stays large, because its config has other names for sizes.
    """
    tokenizer = train(kind, [])
    keys = tiny_config(model_type, len(tokenizer))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
    if (size := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise ValueError(f"{size:,} parameters")
    keys |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    save_text(folder, tokenizer, template(""), model_type, own_keys=keys)
    return folder


def outcome(model_type: str) -> str:
    """Load a tiny model of a class as a run does, and say how that ended."""
    from genrecal_ds.errors import UserError
    from genrecal_ds.models.chat import ChatEncoder
    from genrecal_ds.models.marked_chat import PROBE
    from genrecal_ds.models.vlm import load_vlm

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            write(model_type, folder)
        except Exception as error:  # its config needs sizes of its own
            return f"no tiny model: {type(error).__name__}: {error}"
        try:
            vlm = load_vlm(folder).eval()
            vlm.check(ChatEncoder(folder, 500).encode(PROBE, []).input_ids_T[None])
        except UserError as error:
            return f"refused: {error}"
        except Exception as error:
            return f"fails: {type(error).__name__}: {error}"
    return "works"


def main() -> None:
    """Print each class's outcome, and how many work."""
    outcomes = {name: outcome(name) for name in sys.argv[1:] or text_types()}
    for name, said in outcomes.items():
        print(f"{name}: {' '.join(said.split())[:160]}")
    print(f"{sum(said == 'works' for said in outcomes.values())} of {len(outcomes)} work")


if __name__ == "__main__":
    main()
