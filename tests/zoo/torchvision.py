"""Rows whose processors need torchvision; `make test-extras` runs them."""

from pathlib import Path

from tests.zoo.saving import MEAN, llm, save_vlm, template, vit
from tests.zoo.tokenizers import BOS, Kind, train

PIXTRAL = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def _pixtral_row(model_type: str, merge: int, text: str, **config):
    """Pictures of any size, a break behind every row of patches."""

    def write(folder: Path, kind: Kind) -> None:
        tokenizer = train(kind, PIXTRAL, image_token="[IMG]")
        images = {
            "size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8},
            "image_processor_type": "PixtralImageProcessor", **MEAN,
        }  # fmt: skip
        processor = {
            "patch_size": 8, "spatial_merge_size": merge, "processor_class": "PixtralProcessor",
            "chat_template": template("[IMG]"),
        }  # fmt: skip
        processor["image_processor_type"] = images.pop("image_processor_type")
        save_vlm(
            folder, model_type, tokenizer, images, processor,
            text_config=llm(tokenizer, text),
            vision_config=vit(model_type="pixtral", image_size=64, head_dim=6),
            image_token_id=tokenizer.image_token_id, vision_feature_layer=-1, **config,
        )  # fmt: skip

    return write


def lfm2_vl(folder: Path, kind: Kind) -> None:
    special = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    special += [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
    tokenizer = train(
        kind, special, image_token="<image>", image_start_token="<|image_start|>",
        image_end_token="<|image_end|>", image_thumbnail="<|img_thumbnail|>",
    )  # fmt: skip
    images = {
        "tile_size": 32, "encoder_patch_size": 8, "downsample_factor": 2, "min_image_tokens": 1,
        "max_image_tokens": 4, "max_num_patches": 16, "min_tiles": 1, "max_tiles": 4, **MEAN,
    }  # fmt: skip
    text = llm(
        tokenizer, "lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    save_vlm(
        folder, "lfm2_vl", tokenizer, images, {"chat_template": template("<image>")},
        text_config=text,
        vision_config=vit(
            model_type="siglip2_vision_model", num_patches=16, vision_use_head=False
        ),
        image_token_id=tokenizer.image_token_id, downsample_factor=2, projector_hidden_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip


def phi4_multimodal(folder: Path, kind: Kind) -> None:
    """Its picture's tokens are counted for crops of 448 pixels, whatever the config says.

    So sequences are long, and attention's time goes with its heads: few of them.
    """
    tokenizer = train(
        kind, ["<|image|>", "<|audio|>"], image_token="<|image|>", audio_token="<|audio|>"
    )
    text = llm(
        tokenizer, "phi4_multimodal", num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    text.pop("model_type")
    images = {"size": {"height": 448, "width": 448}, "patch_size": 14, "dynamic_hd": 4, **MEAN}
    save_vlm(
        folder, "phi4_multimodal", tokenizer, images, {"chat_template": template("<|image|>")},
        **text,
        vision_config=vit(
            image_size=448, patch_size=14, crop_size=448, num_attention_heads=1,
            image_token_id=tokenizer.image_token_id,
        ),
        audio_config={
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "nemo_conv_channels": 16, "audio_token_id": 0,
        },
    )  # fmt: skip


MOLMO2 = [
    "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>",
    "<frame_end>", "<im_low>", "<|image|>", "<|video|>",
]  # fmt: skip


def _molmo2_row(bos: str):
    """The tokens of pictures come last: they are embedded, and the head does not know them."""

    def write(folder: Path, kind: Kind) -> None:
        tokenizer = train(kind, [])
        num_words = len(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": MOLMO2})
        token = tokenizer.convert_tokens_to_ids
        images = {
            "size": {"height": 32, "width": 32}, "patch_size": 8, "pooling_size": [2, 2],
            "max_crops": 4, "overlap_margins": [1, 1], **MEAN,
        }  # fmt: skip
        text = llm(
            tokenizer, "molmo2_text", vocab_size=num_words,
            additional_vocab_size=len(tokenizer) - num_words,
        )  # fmt: skip
        vision = vit(image_size=[32, 32], num_key_value_heads=4, head_dim=6)
        save_vlm(
            folder, "molmo2", tokenizer, images, {"chat_template": template("<|image|>", bos=bos)},
            text_config=text, vision_config=vision,
            adapter_config={
                "vision_feature_layer": [1, 0], "hidden_size": 24, "num_attention_heads": 4,
                "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": 48,
                "text_hidden_size": 32,
            },
            image_patch_id=token("<im_patch>"), image_start_token_id=token("<im_start>"),
            image_end_token_id=token("<im_end>"), frame_end_token_id=token("<frame_end>"),
            low_res_image_start_token_id=token("<low_res_im_start>"),
            frame_start_token_id=token("<frame_start>"),
        )  # fmt: skip

    return write


ROWS = {
    "molmo2": _molmo2_row(bos=BOS),
    "molmo2_no_bos": _molmo2_row(bos=""),  # as its releases' templates: the processor adds it
    "phi4_multimodal": phi4_multimodal,
    "mistral3": _pixtral_row(
        "mistral3", 2, "mistral", spatial_merge_size=2, tie_word_embeddings=False
    ),
    "llava_pixtral": _pixtral_row(
        "llava", 1, "mistral", vision_feature_select_strategy="full", tie_word_embeddings=False
    ),
    "lfm2_vl": lfm2_vl,
}  # fmt: skip
