"""Qwen-VL rows: multimodal RoPE, pictures of any size as patches."""

from pathlib import Path
from typing import Any

from tests.zoo.saving import MEAN, llm, save_vlm, template
from tests.zoo.tokenizers import Kind, train

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def _row(model_type: str, vision: dict[str, Any], text: dict[str, Any], patch: int = 8):
    def write(folder: Path, kind: Kind) -> None:
        tokenizer = train(
            kind, SPECIAL, image_token="<|image_pad|>", video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        )  # fmt: skip
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
        keys = llm(tokenizer, f"{model_type}_text", **text)
        keys["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
        }  # fmt: skip
        images = {
            "patch_size": patch, "merge_size": 2, "temporal_patch_size": 1,
            "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **MEAN,
        }  # fmt: skip
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        save_vlm(
            folder, model_type, tokenizer, images,
            {"chat_template": template(image, has_generation_block=True)},
            text_config=keys,
            vision_config={
                "depth": 2, "num_heads": 4, "patch_size": patch, "spatial_merge_size": 2,
                "temporal_patch_size": 1, "in_channels": 3, **vision,
            },
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=False,
        )  # fmt: skip

    return write


ROWS = {
    "qwen2_vl": _row("qwen2_vl", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, {}),
    "qwen2_5_vl": _row(
        "qwen2_5_vl",
        {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 32,
         "fullatt_block_indexes": [1]},
        {},
    ),
    "qwen3_vl": _row(
        "qwen3_vl",
        {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        {},
    ),
}  # fmt: skip
