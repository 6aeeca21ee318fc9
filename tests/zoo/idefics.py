"""Idefics3 and SmolVLM rows: pictures as rows and columns of tiles, and one of the whole."""

from pathlib import Path

from tests.zoo.saving import MEAN, llm, save_vlm, template, vit
from tests.zoo.tokenizers import END, Kind, train


def _row(model_type: str):
    def write(folder: Path, kind: Kind) -> None:
        special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
        special += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
        tokenizer = train(
            kind, special, image_token="<image>", global_image_token="<global-img>",
            fake_image_token="<fake_token_around_image>", end_of_utterance_token=END,
        )  # fmt: skip
        images = {
            "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32},
            "do_image_splitting": True, **MEAN,
        }  # fmt: skip
        processor = {"image_seq_len": 4, "chat_template": template("<image>")}
        save_vlm(
            folder, model_type, tokenizer, images, processor,
            text_config=llm(tokenizer, "llama"), vision_config=vit(),
            image_token_id=tokenizer.image_token_id, scale_factor=2,
            pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
        )  # fmt: skip

    return write


ROWS = {"idefics3": _row("idefics3"), "smolvlm": _row("smolvlm")}
