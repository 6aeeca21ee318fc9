"""Wraps any Hugging Face VLM or LLM as a body, a head and named components.

Shapes: B batch, T sequence length, D width, A rows for the Recalibrator, N target rows.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from genrecal_ds.data.batch import SideBatch
from genrecal_ds.errors import UserError
from genrecal_ds.models.config_file import auto_class, read_config
from genrecal_ds.models.derived import blocks_in, derived_components
from genrecal_ds.models.families import family_of
from genrecal_ds.models.language_head import LanguageHead, logit_transform, transformed
from genrecal_ds.models.loading import load_full, stores_own_head, untie
from genrecal_ds.models.packing import (
    Samples,
    attend_within_samples,
    is_plain,
    packed_inputs,
    spans_of,
    unpacked,
)
from genrecal_ds.models.remote import is_allowed

# bf16 rounds twice on the two ways to the same logits; fp32 only orders sums differently.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class VLM(nn.Module):
    """A transformers model split into body and head. Parameter names are `model.<HF name>`."""

    def __init__(
        self, model: PreTrainedModel, pack: bool | None = False, attention: str | None = None
    ):
        """pack: run a batch's samples as one sequence, without padding (models/packing.py), by
        our attention unless `attention` names one of transformers'; None: where ours is enough.

        Raises UserError for a model whose head has no adapter, and for packing where the family
        does not allow it exactly.
        """
        super().__init__()
        self.model = model
        self.adapter_scale: float | None = None  # with adapters (models/lora.py) in its layers
        model_type = model.config.model_type
        self.family = family_of(model_type)
        self.prefixes = self.family.components or derived_components(model)
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UserError(
                f"{type(model).__name__}: head {type(head).__name__} has no adapter yet"
            )
        if model.base_model is model:
            raise UserError(
                f"{type(model).__name__}: transformers runs its body with its head alone, so its "
                "hidden states cannot be had; take another class"
            )
        if pack and not self.family.packs:
            raise UserError(
                f"pack: {model_type} samples do not stay apart in one sequence; leave it out"
            )
        decoder = model.get_decoder()
        is_ours = self.family.packs and attention is None and is_plain(decoder.config)
        self.pack = is_ours if pack is None else pack
        self.samples: Samples | None = None
        if self.pack and is_ours:
            self.samples = attend_within_samples(decoder)
        # The same module with one more call form: parameters, names and ties stay as they are.
        head.__class__ = LanguageHead
        head.transform = logit_transform(model.config)

    @classmethod
    def from_config(
        cls,
        folder: str | Path,
        dtype: torch.dtype,
        pack: bool | None = False,
        attention: str | None = None,
    ) -> "VLM":
        """Build a folder's architecture with random weights; under zero.Init it is sharded.

        attention: one of transformers' backends; default: transformers' choice. Raises UserError
        for a family without facts in models/families.py, or a backend that would ignore a softcap.
        """
        config = read_config(folder)
        attention = attention or family_of(config.model_type).attention
        _check_attention(folder, config, attention)
        model = _unfilled(folder, config, dtype, attention)
        if stores_own_head(model, folder):
            untie(config)
            del model  # before the second one takes its memory
            model = _unfilled(folder, config, dtype, attention)
        return cls(model, pack, attention)

    def body(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision: Mapping[str, Tensor],
        real_P: Tensor | None = None,
    ) -> Tensor:
        """Return hidden [B, T, D] after the final norm, which is what enters the head.

        real_P: flat positions of the real tokens in [B * T], needed to pack. In a packed body rows
        of padding are 0."""
        vision = {
            key: value.to(self.model.dtype) if value.is_floating_point() else value
            for key, value in vision.items()
        }
        body = self.model.base_model
        if self.pack:
            assert real_P is not None
            if self.samples is not None:
                self.samples.spans = spans_of(attention_mask)
            inputs = packed_inputs(body, self.family, input_ids, attention_mask, vision, real_P)
            return unpacked(body(**inputs, use_cache=False).last_hidden_state, input_ids, real_P)
        output = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **vision)
        return output.last_hidden_state

    def compile_blocks(self) -> None:
        """torch.compile of each decoder block by itself; equal blocks share their code."""
        for block in blocks_in(self.model.get_decoder()):
            block.compile(dynamic=True)

    @torch.no_grad()
    def check(self, input_ids: Tensor) -> None:
        """Check on one text that our head on our body gives the family's own logits.

        What transformers does behind a head differs by family and version. Without this check a
        model could be taught towards other logits than it answers with. Under ZeRO-3 this is a
        collective and works only inside an engine. Raises UserError saying what differs.
        """
        mask, tokens = torch.ones_like(input_ids), {"token_type_ids", "mm_token_type_ids"}
        per_token = {
            key: torch.zeros_like(input_ids) for key in self.family.vision_inputs if key in tokens
        }
        if self.samples is not None:
            self.samples.spans = spans_of(mask)
        own = self.model(
            input_ids=input_ids, attention_mask=mask, use_cache=False, **per_token
        ).logits.float()
        hidden = self.body(
            input_ids, mask, per_token, torch.arange(input_ids.numel()).to(mask.device)
        )
        ours = transformed(self.head(hidden).float(), self.head.transform)
        scale = own.abs().max().clamp(min=1.0)
        error = ((ours - own).abs().max() / scale).item()
        if not error <= SELF_CHECK_TOLERANCE.get(self.model.dtype, 3e-2):
            raise UserError(
                f"{type(self.model).__name__}: head(body(x)) differs from its logits by "
                f"{error:.1e}: it does more behind its body than logit_transform in "
                "models/language_head.py knows; add it there, or take another class"
            )

    @property
    def head(self) -> LanguageHead:
        return self.model.get_output_embeddings()

    @property
    def text_config(self):
        return self.model.config.get_text_config()

    @property
    def is_tied(self) -> bool:
        return self.head.weight is self.model.get_input_embeddings().weight

    def components(self) -> Iterator[tuple[str, nn.Parameter, str]]:
        """(name, parameter, component) of every parameter; a tied pair once, as `embeddings`."""
        for name, parameter in self.named_parameters():
            yield name, parameter, self.component_of(name)

    def component_of(self, name: str) -> str:
        """Component of one of our parameter names."""
        return component_of(name.removeprefix("model."), self.prefixes)

    def train_only(self, trained: tuple[str, ...]) -> None:
        """Set requires_grad by component.

        A tied weight follows `head` and `embeddings` as one. In layers with adapters only the
        adapters train.

        Raises UserError when a tied model is asked to train one of the two only.
        """
        if self.is_tied and ("embeddings" in trained) != ("head" in trained):
            one = "embeddings" if "embeddings" in trained else "head"
            raise UserError(
                f"train: {one} alone, but the student's head is tied; name both or none"
            )
        for name, parameter, component in self.components():
            is_base = self.adapter_scale is not None and component == "layers"
            is_base = is_base and ".lora_" not in name
            parameter.requires_grad_(component in trained and not is_base)


def component_of(name: str, prefixes: Mapping[str, str]) -> str:
    """Component of a Hugging Face parameter name by its longest prefix."""
    matches = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not matches:
        raise UserError(f"parameter {name}: no prefix in models/families.py covers it; add one")
    return prefixes[max(matches, key=len)]


def skeleton(folder: str | Path) -> VLM:
    """A folder's architecture on the meta device: names, shapes and ties, no memory."""
    with torch.device("meta"):
        return VLM.from_config(folder, torch.float32)


def _unfilled(
    folder: str | Path, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    model = auto_class(config).from_config(
        config, dtype=dtype, attn_implementation=attention, trust_remote_code=is_allowed(folder)
    )
    model.tie_weights()  # part of the initialisation that a sharded build skips
    return model


def plain_model(folder: str | Path) -> PreTrainedModel:
    """A folder's own class with its weights, as transformers loads it.

    transformers leaves a head untied that is stored and differs from the embedding; the config
    then says so too, for whoever saves the model.
    """
    config = read_config(folder)
    model = auto_class(config).from_pretrained(
        folder,
        dtype="auto",
        attn_implementation=family_of(config.model_type).attention,
        trust_remote_code=is_allowed(folder),
    )
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not is_tied:
        untie(model.config)
    return model


def _check_attention(folder: str | Path, config: PreTrainedConfig, attention: str | None) -> None:
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and attention == "sdpa":
        raise UserError(
            f"{folder}: attention: sdpa ignores its softcap of {softcap} on attention logits; "
            "take eager, flex_attention or flash_attention_2"
        )


def load_vlm(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    pack: bool = False,
    attention: str | None = None,
) -> VLM:
    """A whole VLM on this process; the trainer loads sharded instead (training/build.py)."""
    vlm = VLM.from_config(folder, dtype, pack, attention)
    load_full(vlm.model, folder)
    return vlm


class TeacherBody(nn.Module):
    """The frozen teacher without its head; it returns only the rows that are read."""

    def __init__(self, teacher: VLM):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> "TeacherBody":
        """Stay in eval mode, whatever the engine asks for."""
        return super().train(False)

    def forward(
        self, inputs: SideBatch, rows_A: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rows [A, H] for the Recalibrator, target rows [N, H]) by flat index into [B*T]."""
        hidden_BTH = self.teacher.body(*inputs)
        rows = hidden_BTH.flatten(0, 1)
        return rows.index_select(0, rows_A), rows.index_select(0, targets_N)
