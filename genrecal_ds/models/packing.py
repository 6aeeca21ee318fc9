"""Runs a body without padding: a padded batch becomes one sequence of real tokens.

Samples are kept apart in one of two ways. Where a decoder does plain causal attention only, our
attention replaces its own (models/attention.py) and attends within each sample. Otherwise (for a
softcap, a sliding window, or a backend that the recipe names) transformers keeps samples apart:
position ids start again at 0 and no mask is given. transformers then makes a block mask over all
tokens of the batch, or uses flash attention's own bookkeeping.

Shapes: B samples, T longest, P real tokens of all samples, D width, h heads, E head width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from genrecal_ds.models.attention import Spans, attend
from genrecal_ds.models.families import Family

OURS = "genrecal_spans"  # in transformers' table of attention functions


class Samples:
    """Holds where the samples of the current batch begin; one object for all layers of a decoder.

    The spans stay until the next batch, because checkpointed blocks read them again in backward.
    """

    spans: Spans | None = None


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether a text config asks for plain causal attention only."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None and not (
        hasattr(config, "use_sliding_window") and not config.use_sliding_window
    )
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    return kinds == {"full_attention"} and not has_window and not has_softcap


def attend_within_samples(decoder: nn.Module) -> Samples:
    """Make our attention the decoder's; the returned object is told where samples begin."""
    samples = Samples()
    decoder.config._attn_implementation = OURS
    for layer in decoder.layers:
        layer.self_attn.samples = samples
    return samples


def _attention(
    module: nn.Module, q_1hPE: Tensor, k_1gPE: Tensor, v_1gPE: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    rows = (states[0].transpose(0, 1) for states in (q_1hPE, k_1gPE, v_1gPE))
    mixed_PhE = attend(*rows, module.samples.spans, options["scaling"], "sdpa")
    return mixed_PhE.unsqueeze(0), None


AttentionInterface.register(OURS, _attention)
AttentionMaskInterface.register(OURS, lambda *arguments, **options: None)


def packed_inputs(
    body: nn.Module,
    family: Family,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    vision: Mapping[str, Tensor],
    real_P: Tensor,
) -> dict[str, Any]:
    """Make the packed inputs of `body` from a padded batch; vision inputs keep their order."""
    text_BT = attention_mask_BT.cumsum(-1) - 1
    packed = {"input_ids": _rows(input_ids_BT, real_P), "attention_mask": None}
    for key, value in vision.items():
        is_per_token = family.vision_inputs[key] == "tokens"
        packed[key] = _rows(value, real_P) if is_per_token else value
    positions_1P = _rows(text_BT, real_P)
    if hasattr(body, "get_rope_index"):
        # Multimodal RoPE. As two axes its ids would be taken for plain ones and samples would see
        # each other, silently: the first of four says where samples begin, three rotate.
        axes_3BT = text_BT.expand(3, -1, -1)
        if "image_grid_thw" in vision:
            axes_3BT, _ = body.get_rope_index(
                input_ids_BT,
                attention_mask=attention_mask_BT,
                mm_token_type_ids=vision["mm_token_type_ids"],
                image_grid_thw=vision["image_grid_thw"],
            )
        axes_31P = axes_3BT.flatten(1).index_select(1, real_P).unsqueeze(1)
        positions = torch.cat([positions_1P[None], axes_31P])
    else:
        positions = positions_1P
    return {**packed, "position_ids": positions}


def spans_of(attention_mask_BT: Tensor) -> Spans:
    """One span per sample. The longest is the batch's width, known without asking the device."""
    lengths_B = attention_mask_BT.sum(-1, dtype=torch.int32)
    cu = torch.nn.functional.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))
    longest = attention_mask_BT.shape[1]
    return Spans(cu, cu, longest, longest)


def unpacked(hidden_1PD: Tensor, input_ids_BT: Tensor, real_P: Tensor) -> Tensor:
    """Put packed rows back into hidden [B, T, D]; rows of padding are 0."""
    flat = hidden_1PD.new_zeros(input_ids_BT.numel(), hidden_1PD.shape[-1])
    return flat.index_copy(0, real_P, hidden_1PD[0]).unflatten(0, input_ids_BT.shape)


def _rows(values_BT: Tensor, real_P: Tensor) -> Tensor:
    return values_BT.flatten().index_select(0, real_P).unsqueeze(0)
