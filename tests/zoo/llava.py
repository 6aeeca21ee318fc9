"""LLaVA, LLaVA-Next, LLaVA-OneVision and InternVL rows: a vision tower, a projector, an LLM."""

from pathlib import Path

from tests.zoo.saving import MEAN, llm, save_vlm, template, vit
from tests.zoo.tokenizers import Kind, train

CLIP_PIXELS = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **MEAN}
CLIP_TOKENS = {
    "patch_size": 8, "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1, "chat_template": template("<image>"),
}  # fmt: skip


def llava(folder: Path, kind: Kind) -> None:
    tokenizer = train(kind, ["<image>"], image_token="<image>")
    save_vlm(
        folder, "llava", tokenizer, CLIP_PIXELS, CLIP_TOKENS,
        text_config=llm(tokenizer, "llama"),
        vision_config=vit(model_type="clip_vision_model", projection_dim=24),
        image_token_id=tokenizer.image_token_id, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=16,
        tie_word_embeddings=False,
    )  # fmt: skip


def _internvl(text: str, is_tied: bool):
    """InternVL 2.5, 3 and 3.5 differ in what reads the tokens."""

    def write(folder: Path, kind: Kind) -> None:
        tokenizer = train(
            kind, ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"], start_image_token="<img>",
            end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
        )  # fmt: skip
        images = {
            "size": {"height": 16, "width": 16}, "crop_to_patches": True, "min_patches": 1,
            "max_patches": 4, **MEAN,
        }  # fmt: skip
        processor = {"image_seq_length": 4, "chat_template": template("<IMG_CONTEXT>")}
        save_vlm(
            folder, "internvl", tokenizer, images, processor,
            text_config=llm(tokenizer, text, tie_word_embeddings=is_tied),
            vision_config=vit(image_size=16, patch_size=4),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
            downsample_ratio=0.5, tie_word_embeddings=is_tied,
        )  # fmt: skip

    return write


def llava_next(folder: Path, kind: Kind) -> None:
    tokenizer = train(kind, ["<image>"], image_token="<image>")
    grid = [[32, 64], [64, 32], [64, 64]]
    images = {**CLIP_PIXELS, "image_grid_pinpoints": grid}
    save_vlm(
        folder, "llava_next", tokenizer, images, CLIP_TOKENS,
        text_config=llm(tokenizer, "mistral"),
        vision_config=vit(model_type="clip_vision_model", projection_dim=24),
        image_token_id=tokenizer.image_token_id, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_grid_pinpoints=grid,
        image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip


def llava_onevision(folder: Path, kind: Kind) -> None:
    tokenizer = train(kind, ["<image>", "<video>"], image_token="<image>", video_token="<video>")
    grid = [[32, 64], [64, 32], [64, 64]]
    images = {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": grid, **MEAN}
    processor = {
        "num_image_tokens": 16, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9", "chat_template": template("<image>"),
    }  # fmt: skip
    save_vlm(
        folder, "llava_onevision", tokenizer, images, processor,
        text_config=llm(tokenizer, "qwen2"),
        vision_config=vit(model_type="siglip_vision_model"),
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=grid, tie_word_embeddings=False,
    )  # fmt: skip


ROWS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": _internvl("qwen2", is_tied=True),
    "internvl_llama": _internvl("llama", is_tied=False),
    "internvl_qwen3": _internvl("qwen3", is_tied=False),
}
