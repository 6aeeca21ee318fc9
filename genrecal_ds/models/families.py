"""Lists what cannot be found out about a model family, as data; models/derived.py finds the rest.

A class without an entry works if it passes the checks that are made when it is loaded. An entry
says more than can be found out: what packs, what a backend gets wrong, how pictures are batched.

`components` maps parameter-name prefixes to components; the longest matching prefix wins.
`vision_inputs` says how a processor's image tensors of single samples become a batch:
  rows    concatenate along dim 0 (patches, tiles, grids)
  tokens  one value per token: pad like input_ids, with 0
  tiles   [n, tiles, ...]: pad dim 1 with zeros to the batch's largest, then concatenate
  canvas  [n, channels, height, width]: pad height and width with zeros, then concatenate
  columns concatenate along the last dim
  patches numbers of patches of pixel_values [crops, patches, ..]: shifted by the patches of the
          samples before, then concatenated like rows; negative numbers stand for none and stay
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

CollateRule = Literal["rows", "tokens", "tiles", "canvas", "columns", "patches"]


@dataclass(frozen=True)
class Family:
    components: dict[str, str] = field(default_factory=dict)  # {}: derived from the model
    vision_inputs: dict[str, CollateRule] = field(default_factory=dict)  # {}: reads text only
    packs: bool = True  # several samples in one sequence, exactly (models/packing.py)
    attention: str | None = None  # in place of transformers' choice, where that goes wrong
    # Questions attend in both directions, answers causally: one turn, whose tokens have type 1.
    # Such a processor writes text around pictures by itself; ours expands placeholders alone.
    prefix_lm: bool = False
    template: str | None = None  # for folders without one
    writes_bos: bool = False  # its processor puts bos in front of a text that has none
    needs_torchvision: bool = False  # its pixels, or its processor, come from torchvision alone


def _language(prefix: str, norm: str = "norm.") -> dict[str, str]:
    return {
        f"{prefix}embed_tokens.": "embeddings",
        f"{prefix}layers.": "layers",
        f"{prefix}{norm}": "norm",
        "lm_head.": "head",
    }


def _seeing(vision: str, projectors: tuple[str, ...], language: str) -> dict[str, str]:
    return {
        f"model.{vision}.": "vision",
        **{f"model.{name}.": "projector" for name in projectors},
        **_language(f"model.{language}."),
    }


_PIXELS: dict[str, CollateRule] = {"pixel_values": "rows"}
_TEXT = Family(_language("model."))
_QWEN_VL = Family(
    components={
        "model.visual.": "vision",
        "model.visual.merger.": "projector",
        "model.visual.deepstack_merger_list.": "projector",
        **_language("model.language_model."),
    },
    vision_inputs={**_PIXELS, "image_grid_thw": "rows", "mm_token_type_ids": "tokens"},
)
_LLAVA = {
    **_seeing("vision_tower", ("multi_modal_projector",), "language_model"),
    "model.image_newline": "projector",
}
_IDEFICS = Family(
    _seeing("vision_model", ("connector",), "text_model"),
    {"pixel_values": "tiles", "pixel_attention_mask": "tiles"},
)
_ANY_SIZE: dict[str, CollateRule] = {"pixel_values": "canvas", "image_sizes": "rows"}
_PALIGEMMA_TEMPLATE = (
    "{% macro text(message) %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% for message in messages if message.content is not string %}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}{% endfor %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ text(message) }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ text(message) }}{{ '\n' }}{% endif %}{% endfor %}"
)
_GEMMA = Family(_LLAVA, {**_PIXELS, "token_type_ids": "tokens"}, packs=False)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "internvl": Family(_LLAVA, _PIXELS),
    "llava": Family(_LLAVA, _ANY_SIZE),
    "llava_next": Family(_LLAVA, {"pixel_values": "tiles", "image_sizes": "rows"}),
    "llava_onevision": Family(
        _LLAVA, {"pixel_values": "tiles", "image_sizes": "rows", "batch_num_images": "rows"}
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "gemma3": _GEMMA,
    "paligemma": replace(_GEMMA, prefix_lm=True, template=_PALIGEMMA_TEMPLATE),
    "lfm2_vl": Family(
        {**_LLAVA, **_language("model.language_model.", "embedding_norm.")},
        {"pixel_values": "tiles", "spatial_shapes": "rows", "pixel_attention_mask": "tiles"},
        packs=False,  # its short convolutions reach over the border of two samples
        needs_torchvision=True,
    ),
    "minicpmv4_6": Family(
        _seeing("vision_tower", ("merger", "vision_tower.vit_merger"), "language_model"),
        {"pixel_values": "columns", "target_sizes": "rows"},
        packs=False,  # linear attention carries its state over the border of two samples
    ),
    "mistral3": Family(_LLAVA, _ANY_SIZE, needs_torchvision=True),
    "molmo2": Family(
        _seeing("vision_tower", ("multi_modal_projector",), "language_model"),
        {
            **_PIXELS, "image_token_pooling": "patches", "image_grids": "rows",
            "image_num_crops": "rows", "mm_token_type_ids": "tokens",
        },
        packs=False,  # the tokens of all pictures see each other, across samples too
        writes_bos=True,
        needs_torchvision=True,
    ),
    "ovis2": Family(
        _seeing("vision_tower", ("vision_tower.head_linear", "vision_tower.head_norm",
                                 "visual_embeddings_table"), "language_model"),
        _PIXELS,
    ),
    "phi4_multimodal": Family(
        {
            "model.embed_tokens_extend.": "vision",  # ears included
            "model.embed_tokens_extend.image_embed.img_projection_": "projector",
            "model.embed_tokens_extend.image_embed.global_img_feature_extensor": "projector",
            "model.embed_tokens_extend.image_embed.sub_img_feature_extensor": "projector",
            **_language("model."),
        },
        {"image_pixel_values": "tiles", "image_sizes": "rows", "image_attention_mask": "tiles"},
        packs=False,
        # With sdpa its vision encoder attends causally where a picture fills its crops, and fully
        # where this or another picture of the batch does not (transformers 5.23).
        attention="eager",
        needs_torchvision=True,
    ),
    "gemma": _TEXT,
    "gemma2": _TEXT,
    "gemma3_text": _TEXT,
    "internlm3": _TEXT,
    "llama": _TEXT,
    "mistral": _TEXT,
    "phi3": _TEXT,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
}  # fmt: skip
# Reads text, pads, and derives its components: every class without an entry that reads text only.
UNLISTED_TEXT = Family(packs=False)


def family_of(model_type: str) -> Family:
    """Return what is known of a family. Raises KeyError where nothing is: see is_known."""
    return UNLISTED_TEXT if _is_unlisted_text(model_type) else FAMILIES[model_type]


def is_known(model_type: str) -> bool:
    """Whether a model_type has an entry, or reads text only and needs none."""
    return model_type in FAMILIES or _is_unlisted_text(model_type)


def _is_unlisted_text(model_type: str) -> bool:
    sees = model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    is_text = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not sees
    return is_text and model_type not in FAMILIES
