"""MiniCPM-V 4.6: pictures as patches side by side, a decoder of mostly linear attention."""

from pathlib import Path

from tests.zoo.saving import MEAN, llm, save_vlm, template, vit
from tests.zoo.tokenizers import Kind, train

SPECIAL = {
    "image_token": "<image_pad>", "video_token": "<video_pad>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip


def minicpmv4_6(folder: Path, kind: Kind) -> None:
    tokenizer = train(kind, list(SPECIAL.values()), **SPECIAL)
    images = {"patch_size": 4, "scale_resolution": 32, "max_slice_nums": 4, **MEAN}
    text = llm(
        tokenizer, "qwen3_5_text", layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4,
    )  # fmt: skip
    text["rope_parameters"] |= {"partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
    save_vlm(
        folder, "minicpmv4_6", tokenizer, images, {"chat_template": template("<image_pad>")},
        text_config=text, vision_config=vit(patch_size=4), insert_layer_id=0,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip


ROWS = {"minicpmv4_6": minicpmv4_6}
