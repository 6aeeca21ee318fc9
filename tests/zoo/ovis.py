"""Ovis2: a vision tower that chooses from a table of visual words."""

from pathlib import Path

from tests.zoo.saving import MEAN, llm, save_vlm, template, vit
from tests.zoo.tokenizers import Kind, train

SPECIAL = [
    "<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>",
]  # fmt: skip


def ovis2(folder: Path, kind: Kind) -> None:
    tokenizer = train(kind, SPECIAL, image_token="<IMG_ATOM>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    images = {
        "size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1,
        "max_patches": 4, "use_covering_area_grid": False, **MEAN,
    }  # fmt: skip
    save_vlm(
        folder, "ovis2", tokenizer, images,
        {"image_seq_length": 4, "chat_template": template("<image>")},
        text_config=llm(tokenizer, "qwen2", tie_word_embeddings=True),
        vision_config=vit(
            hidden_stride=2, vocab_size=48, num_visual_indicator_tokens=5, rms_norm_eps=1e-5
        ),
        image_token_id=ids["<IMG_ATOM>"], visual_indicator_token_ids=[ids[t] for t in indicators],
        hidden_size=32, vocab_size=len(tokenizer), tie_word_embeddings=True,
    )  # fmt: skip


ROWS = {"ovis2": ovis2}
