"""What every row shares: the chat template, tiny sizes, and writing the folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from genrecal_ds.models.config_file import auto_class
from genrecal_ds.models.processors import TextProcessor, build_processor
from tests.zoo.tokenizers import BOS, BOT, END, SYSTEM, USER

STD = 0.1  # of all matrices: at the usual 0.02 a picture hardly changes what so narrow a model says
MEAN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def template(image: str, has_generation_block: bool = False, bos: str = BOS) -> str:
    """A chat template that writes `image` for a picture."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if has_generation_block else ("", "")
    content = (
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}{% endif %}"
    )
    return (
        f"{bos}{{% for message in messages %}}"
        f"{{% if message.role == 'assistant' %}}{BOT}{begin}{content}{END}{end}{{% else %}}"
        f"{{% if message.role == 'system' %}}{SYSTEM}{{% else %}}{USER}{{% endif %}}"
        f"{content}{END}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{BOT}{{% endif %}}"
    )


def llm(tokenizer: PreTrainedTokenizerBase, model_type: str, width: int = 32, **more: Any) -> dict:
    """A text config's keys, for a family of the Llama shape."""
    return {
        "model_type": model_type, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": width // 4, "vocab_size": len(tokenizer), "max_position_embeddings": 1024,
        "initializer_range": STD, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **more,
    }  # fmt: skip


def vit(width: int = 24, **more: Any) -> dict:
    """A vision config's keys, for a family of the ViT shape."""
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, **more,
    }  # fmt: skip


def save_vlm(
    folder: Path,
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    image_settings: dict[str, Any],
    processor_settings: dict[str, Any],
    **config: Any,
) -> None:
    """Write a VLM: config keys of the family; processor_settings with the chat_template."""
    processor = build_processor(model_type, tokenizer, image_settings, **processor_settings)
    save(folder, AutoConfig.for_model(model_type, **config), processor)


def save_text(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    model_type: str,
    own_keys: dict[str, Any] | None = None,
    **config: Any,
) -> None:
    """Write a text-only model: config keys of the Llama shape, or a family's own_keys."""
    tokenizer.chat_template = chat_template
    keys = own_keys or llm(tokenizer, model_type, **config)
    keys = {key: value for key, value in keys.items() if key != "model_type"}
    save(folder, AutoConfig.for_model(model_type, **keys), TextProcessor(tokenizer))


def save(folder: Path, config: Any, processor: Any) -> None:
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=STD)
    end = processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=end, do_sample=False, max_new_tokens=8
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
