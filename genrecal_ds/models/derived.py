"""Finds out from a model what models/families.py does not say of its class.

transformers knows where a model's embedding, head, decoder and encoders are. What stands between
them projects. Nothing here goes by the name of a model.
"""

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Parts inside an encoder, or beside it, that make its features the decoder's.
PROJECTS = re.compile(
    r"project|connector|merger|resampl|perceiver|abstractor|align|adapt|newline|bridge|proj$"
)
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "ln_f", "norm_f")
MODALITIES = ("image", "video", "audio")


def derived_components(model: PreTrainedModel) -> dict[str, str]:
    """Component by prefix of a parameter's name, for a class without an entry in families.py."""
    names = {id(module): f"{name}." for name, module in model.named_modules() if name}
    decoder = model.get_decoder()
    encoders = find_encoders(model)
    found = {"": "projector" if encoders else "layers"}
    for encoder in encoders:
        prefix = names[id(encoder)]
        found[prefix] = "vision"  # eyes, and ears
        children = (name for name, _ in encoder.named_children() if PROJECTS.search(name))
        found |= {f"{prefix}{name}.": "projector" for name in children}
    prefix = names.get(id(decoder), "")
    found[prefix] = "layers"
    for name, child in decoder.named_children():
        own = f"{prefix}{name}."
        if child is model.get_input_embeddings() or isinstance(child, nn.Embedding):
            found[own] = "embeddings"
        elif name in FINAL_NORMS:
            found[own] = "norm"
    found[names[id(model.get_input_embeddings())]] = "embeddings"
    found[names[id(model.get_output_embeddings())]] = "head"
    return found


def blocks_in(decoder: nn.Module) -> nn.ModuleList:
    """A decoder's blocks, by whatever name: its list of modules with the most parameters."""
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def num_heads(text_config: PreTrainedConfig) -> int:
    """The number of attention heads; of a model without attention, heads of 64 in its width."""
    heads = getattr(text_config, "num_attention_heads", None)
    return heads or max(1, text_config.hidden_size // 64)


def inner_width(text_config: PreTrainedConfig) -> int:
    """The width inside a block's MLP, by the names that configs give it."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    widths = (getattr(text_config, name, None) for name in names)
    return next(filter(None, widths), 4 * text_config.hidden_size)


def find_encoders(model: PreTrainedModel) -> list[nn.Module]:
    """The encoders of pictures, films and sounds that transformers knows of a model."""
    decoder, found = model.get_decoder(), []
    for modality in MODALITIES:
        try:
            encoder = model.get_encoder(modality=modality)
        except (AttributeError, TypeError, ValueError):
            continue
        is_own = encoder is not None and encoder not in (model, model.base_model, decoder)
        if is_own and not any(encoder is known for known in found):
            found.append(encoder)
    return found


def adds_one(norm: nn.Module, width: int) -> bool:
    """Whether a norm multiplies by 1 + weight, seen by what it makes of a weight of ones."""
    own = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.fill_(1.0)
        rows = torch.linspace(-1, 1, width)[None]
        return bool(
            own(rows).abs().mean() > 1.5 * nn.functional.rms_norm(rows, (width,)).abs().mean()
        )
