"""Facts per model family, as data; no logic.

`components` maps parameter-name prefixes to components; the longest matching prefix wins.
`vision_inputs` says how a processor's image tensors of single samples become a batch:
  rows    concatenate along dim 0 (patches, tiles, grids)
  tokens  one value per token: pad like input_ids, with 0
  tiles   [1, tiles, ...]: pad dim 1 with zeros to the batch's largest, then concatenate
"""

from dataclasses import dataclass
from typing import Literal

CollateRule = Literal["rows", "tokens", "tiles"]


@dataclass(frozen=True)
class Family:
    components: dict[str, str]
    vision_inputs: dict[str, CollateRule]


def _language(prefix: str) -> dict[str, str]:
    return {
        f"{prefix}embed_tokens.": "embeddings",
        f"{prefix}layers.": "layers",
        f"{prefix}norm.": "norm",
        "lm_head.": "head",
    }


_QWEN_VL = Family(
    components={
        "model.visual.": "vision",
        "model.visual.merger.": "projector",
        "model.visual.deepstack_merger_list.": "projector",
        **_language("model.language_model."),
    },
    vision_inputs={
        "pixel_values": "rows",
        "image_grid_thw": "rows",
        "mm_token_type_ids": "tokens",
    },
)
_LLAVA = Family(
    components={
        "model.vision_tower.": "vision",
        "model.multi_modal_projector.": "projector",
        **_language("model.language_model."),
    },
    vision_inputs={"pixel_values": "rows"},
)
_IDEFICS = Family(
    components={
        "model.vision_model.": "vision",
        "model.connector.": "projector",
        **_language("model.text_model."),
    },
    vision_inputs={"pixel_values": "tiles", "pixel_attention_mask": "tiles"},
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN_VL,
    "internvl": _LLAVA,
    "idefics3": _IDEFICS,
}
