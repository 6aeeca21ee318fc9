"""Gemma3 and PaliGemma rows: pictures whose tokens see each other in both directions."""

from pathlib import Path

from transformers import AutoConfig

from genrecal_ds.models.processors import build_processor
from tests.zoo.saving import MEAN, llm, save, save_vlm, template, vit
from tests.zoo.tokenizers import Kind, train


def gemma3(folder: Path, kind: Kind) -> None:
    tokenizer = train(
        kind, ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    images = {"size": {"height": 32, "width": 32}, **MEAN}
    processor = {"image_seq_length": 4, "chat_template": template("<start_of_image>")}
    text = llm(
        tokenizer, "gemma3_text", query_pre_attn_scalar=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    text.pop("rope_parameters")
    save_vlm(
        folder, "gemma3", tokenizer, images, processor,
        text_config=text, vision_config=vit(model_type="siglip_vision_model"),
        image_token_id=tokenizer.image_token_id, mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip


def _paligemma(text_type: str, **text):
    def write(folder: Path, kind: Kind) -> None:
        tokenizer = train(kind, ["<image>"], image_token="<image>")
        images = {"size": {"height": 32, "width": 32}, "image_seq_length": 16, **MEAN}
        # The processor adds a thousand tokens for places and shapes.
        processor = build_processor("paligemma", tokenizer, images)
        config = AutoConfig.for_model(
            "paligemma", text_config=llm(tokenizer, text_type, **text),
            vision_config=vit(model_type="siglip_vision_model", projection_dim=32),
            image_token_id=tokenizer.image_token_id, projection_dim=32, hidden_size=32,
        )  # fmt: skip
        save(folder, config, processor)

    return write


ROWS = {
    "gemma3": gemma3,
    "paligemma": _paligemma("gemma"),
    "paligemma2": _paligemma(
        "gemma2", query_pre_attn_scalar=8, sliding_window=8, attn_logit_softcapping=10.0,
        final_logit_softcapping=5.0,
    ),
}  # fmt: skip
