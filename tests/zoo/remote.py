"""A folder that brings its own modelling code, for tests of `allow_remote_code`."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from genrecal_ds.models.families import Family
from genrecal_ds.models.processors import build_processor
from tests.zoo.saving import MEAN, template
from tests.zoo.tokenizers import train

CODE = Path(__file__).parent / "remote_code"
FAMILY = Family(
    components={
        "model.eye.": "vision",
        "model.bridge.": "projector",
        "model.language_model.embed_tokens.": "embeddings",
        "model.language_model.layers.": "layers",
        "model.language_model.norm.": "norm",
        "lm_head.": "head",
    },
    vision_inputs={"pixel_values": "rows"},
    packs=False,
)


def build_looker(folder: Path) -> Path:
    """Weights are drawn by name and shape: writing the folder runs none of its code either."""
    tokenizer = train("byte_bpe", ["<image>"], image_token="<image>")
    images = {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **MEAN,
    }  # fmt: skip
    processor = build_processor(
        "llava", tokenizer, images, patch_size=8, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=template("<image>"),
    )  # fmt: skip
    processor.save_pretrained(folder)
    for path in CODE.glob("*.py"):
        shutil.copy(path, folder)
    config = {
        "model_type": "looker", "architectures": ["LookerForCausalLM"], "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_looker.LookerConfig",
            "AutoModelForCausalLM": "modeling_looker.LookerForCausalLM",
        },
        "vocab_size": len(tokenizer), "image_token_id": tokenizer.image_token_id,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    end = tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(shape) for name, shape in _shapes(len(tokenizer)).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def _shapes(vocabulary: int, width: int = 32) -> dict[str, tuple[int, ...]]:
    language = "model.language_model."
    shapes = {
        "model.eye.weight": (width, 192), "model.eye.bias": (width,),
        "model.bridge.weight": (width, width), "model.bridge.bias": (width,),
        f"{language}embed_tokens.weight": (vocabulary, width),
        f"{language}norm.weight": (width,), "lm_head.weight": (vocabulary, width),
    }  # fmt: skip
    for layer in (f"{language}layers.{number}." for number in range(2)):
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (width, width),
            f"{layer}self_attn.k_proj.weight": (width // 2, width),
            f"{layer}self_attn.v_proj.weight": (width // 2, width),
            f"{layer}self_attn.o_proj.weight": (width, width),
            f"{layer}mlp.gate_proj.weight": (2 * width, width),
            f"{layer}mlp.up_proj.weight": (2 * width, width),
            f"{layer}mlp.down_proj.weight": (width, 2 * width),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
        }  # fmt: skip
    return shapes
