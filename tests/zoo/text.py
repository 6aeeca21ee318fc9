"""Text-only rows: the pairs of the paper's table 6(g), and families with softcaps or windows."""

from pathlib import Path

from tests.zoo.saving import save_text, template
from tests.zoo.tokenizers import Kind, train


def _row(model_type: str, has_generation_block: bool = False, **config):
    def write(folder: Path, kind: Kind) -> None:
        chat_template = template("", has_generation_block)
        save_text(folder, train(kind, []), chat_template, model_type=model_type, **config)

    return write


ROWS = {
    "llama": _row("llama", tie_word_embeddings=False),
    "qwen2": _row("qwen2", has_generation_block=True, tie_word_embeddings=True),
    "qwen3": _row("qwen3", tie_word_embeddings=False),
    "mistral": _row("mistral", tie_word_embeddings=False),
    "internlm3": _row("internlm3", tie_word_embeddings=False),
    "gemma2": _row(  # softcaps on attention and on the logits
        "gemma2", query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=5.0,
        attn_logit_softcapping=10.0,
    ),
    "gemma3_text": _row(  # every second layer sees a window, with a rotary base of its own
        "gemma3_text", query_pre_attn_scalar=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3": _row("phi3", tie_word_embeddings=False, partial_rotary_factor=1.0),
}  # fmt: skip
