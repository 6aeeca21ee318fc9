"""Makes the demo's two models, which share nothing, as real folders with random weights.

    teacher   Qwen2-VL, byte-level BPE of the tiktoken kind, one visual token per 16 x 16 pixels
    student   InternVL, sentencepiece BPE, tiles of 16 x 16 pixels and a thumbnail, 4 tokens each

Vocabularies, ids, splits, visual-token counts, chat templates and head ties all differ.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from genrecal_ds.models.processors import build_processor

# Of all matrices. At these widths the usual 0.02 starves attention: after 400 steps the teacher
# names a single digit in 38 % of the cases with it, in 96 % with 0.08 (docs/log.md).
TEACHER_STD, STUDENT_STD = 0.08, 0.12
TEACHER_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEACHER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% endgeneration %}"
    "{% elif message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STUDENT_SPECIAL = ["<image>", "</image>", "<image_context>", "<video>", "<user>", "<bot>", "<end>"]
# No generation block: its answers are found by rendering prefixes.
STUDENT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<bot>{% else %}<user>{% endif %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image_context>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def build_pair(texts: Iterable[str], out: Path, seed: int = 0) -> None:
    """Write out/teacher_init and out/student_init; out/twin_init, a student of the teacher's family
    and tokenizer, for baselines that need one; small_init and large_init, students of other sizes
    for studies. Tokenizers are trained on `texts`."""
    lines = list(texts)
    torch.manual_seed(seed)
    build_teacher(lines, out / "teacher_init")
    build_student(lines, out / "student_init")
    build_teacher(lines, out / "twin_init", width=64, layers=2)
    build_student(lines, out / "small_init", width=32, layers=2)
    build_student(lines, out / "large_init", width=128, layers=3, std=TEACHER_STD)


def build_teacher(lines: list[str], folder: Path, *, width: int = 128, layers: int = 3) -> None:
    """A Qwen2-VL folder with an untied head."""
    tokenizer = _byte_level_bpe(lines, TEACHER_SPECIAL, vocab_size=400)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TEACHER_SPECIAL}
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config={
            "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 512, "initializer_range": TEACHER_STD,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0,
                "mrope_section": [width // 16, width // 32, width // 32],
            },
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "embed_dim": 64, "hidden_size": width, "depth": 2, "num_heads": 4, "mlp_ratio": 3,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    images = {
        "patch_size": 8, "merge_size": 2, "temporal_patch_size": 1,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 128 * 128},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    processor = build_processor("qwen2_vl", tokenizer, images, chat_template=TEACHER_TEMPLATE)
    _save(config, processor, folder, ids["<|im_end|>"], ids["<|endoftext|>"])


def build_student(
    lines: list[str], folder: Path, *, width: int = 64, layers: int = 2, std: float = STUDENT_STD
) -> None:
    """An InternVL folder with a tied head. std: of all matrices."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = _sentencepiece(lines, STUDENT_SPECIAL, Path(scratch), vocab_size=440)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in STUDENT_SPECIAL}
    config = AutoConfig.for_model(
        "internvl",
        text_config={
            "model_type": "qwen2", "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": len(tokenizer), "max_position_embeddings": 512,
            "initializer_range": std,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": ids["<end>"],
            "pad_token_id": tokenizer.unk_token_id, "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "image_size": 16, "patch_size": 4,
        },
        image_token_id=ids["<image_context>"], image_seq_length=4, downsample_ratio=0.5,
        tie_word_embeddings=True,
    )  # fmt: skip
    images = {
        "size": {"height": 16, "width": 16}, "crop_to_patches": True, "min_patches": 1,
        "max_patches": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    processor = build_processor(
        "internvl", tokenizer, images, image_seq_length=4, chat_template=STUDENT_TEMPLATE
    )
    _save(config, processor, folder, ids["<end>"], tokenizer.unk_token_id)


def _save(config, processor, folder: Path, end_of_turn: int, padding: int) -> None:
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=config.get_text_config().initializer_range)
    model.generation_config = GenerationConfig(
        eos_token_id=end_of_turn, pad_token_id=padding, do_sample=False, max_new_tokens=32
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _byte_level_bpe(
    lines: list[str], special: list[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    roles = ["user\nassistant\n"] * len(lines)  # words of the template, once per conversation
    tokenizer.train_from_iterator([*lines, *roles], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        additional_special_tokens=special,
    )  # fmt: skip


def _sentencepiece(
    lines: list[str], special: list[str], scratch: Path, vocab_size: int
) -> LlamaTokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(scratch / "tokenizer"),
        model_type="bpe", vocab_size=vocab_size, user_defined_symbols=special,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return LlamaTokenizer.from_pretrained(
        scratch, eos_token="<end>", additional_special_tokens=special,
        extra_special_tokens={
            "start_image_token": "<image>", "end_image_token": "</image>",
            "context_image_token": "<image_context>", "video_token": "<video>",
        },
    )  # fmt: skip
