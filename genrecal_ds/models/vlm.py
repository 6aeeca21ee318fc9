"""Any Hugging Face VLM as one interface: body, head, and what each parameter belongs to.

Shapes: B batch, T sequence length, D width, N loss rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from genrecal_ds.data.batch import SideBatch
from genrecal_ds.errors import UserError
from genrecal_ds.models.families import FAMILIES
from genrecal_ds.models.loading import load_full
from genrecal_ds.ops.head_loss import Head
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy

COMPONENTS = ("vision", "projector", "embeddings", "layers", "norm", "head")


class LanguageHead(nn.Linear):
    """A model's own output layer that can also return the cross entropy without all logits.

    The loss is computed inside this module's forward, because there ZeRO-3 has gathered the
    weight; read anywhere else it has no elements.
    """

    def forward(
        self, rows: Tensor, labels_N: Tensor | None = None, row_weights_N: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of rows [.., D], or with labels (weighted CE sum, CE per row [N])."""
        if labels_N is None:
            return super().forward(rows)
        return linear_cross_entropy(rows, labels_N, Head(self.weight, self.bias), row_weights_N)


class VLM(nn.Module):
    """A transformers VLM split into body and head. Parameter names are `model.<HF name>`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.family = FAMILIES[model.config.model_type]
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UserError(
                f"{type(model).__name__}: head {type(head).__name__} has no adapter yet"
            )
        # The same module with one more call form: parameters, names and ties stay as they are.
        head.__class__ = LanguageHead

    @classmethod
    def from_config(cls, folder: str | Path, dtype: torch.dtype) -> "VLM":
        """The architecture of a folder with random weights; call it under zero.Init to shard it.

        Raises UserError for a family without facts in models/families.py.
        """
        config = read_config(folder)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        model.tie_weights()  # part of the initialisation that a sharded build skips
        return cls(model)

    def body(
        self, input_ids: Tensor, attention_mask: Tensor, vision: Mapping[str, Tensor]
    ) -> Tensor:
        """hidden [B, T, D] after the final norm: what enters the head."""
        vision = {
            key: value.to(self.model.dtype) if value.is_floating_point() else value
            for key, value in vision.items()
        }
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **vision
        )
        return output.last_hidden_state

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
        """(name, parameter, component) of every parameter, a tied pair once, as `embeddings`."""
        for name, parameter in self.named_parameters():
            yield name, parameter, component_of(name.removeprefix("model."), self.family.components)

    def train_only(self, trained: tuple[str, ...]) -> None:
        """Set requires_grad by component. A tied weight follows `head` and `embeddings` as one.

        Raises UserError when a tied model is asked to train one of the two only.
        """
        if self.is_tied and ("embeddings" in trained) != ("head" in trained):
            one = "embeddings" if "embeddings" in trained else "head"
            raise UserError(
                f"train: {one} alone, but the student's head is tied; name both or none"
            )
        for _, parameter, component in self.components():
            parameter.requires_grad_(component in trained)


def component_of(name: str, prefixes: Mapping[str, str]) -> str:
    """Component of a Hugging Face parameter name by its longest prefix."""
    matches = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not matches:
        raise UserError(f"parameter {name}: no prefix in models/families.py covers it; add one")
    return prefixes[max(matches, key=len)]


def read_config(folder: str | Path):
    """A folder's transformers config. Raises UserError for an unknown family."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{folder}: model_type {config.model_type} has no adapter; known: {known}")
    text = config.get_text_config()
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(text, key, None) not in (None, 1.0):
            raise UserError(f"{folder}: {key} changes the logits after the head; no adapter yet")
    return config


def load_vlm(folder: str | Path, dtype: torch.dtype = torch.float32) -> VLM:
    """A whole VLM on this process; the trainer loads sharded instead (training/build.py)."""
    vlm = VLM.from_config(folder, dtype)
    load_full(vlm.model, folder)
    return vlm


class TeacherBody(nn.Module):
    """The frozen teacher without its head: only the rows that someone reads leave it."""

    def __init__(self, teacher: VLM):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> "TeacherBody":
        """Always in eval mode, whatever the engine asks for."""
        return super().train(False)

    def forward(
        self, inputs: SideBatch, rows_A: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rows [A, H] for the Recalibrator, target rows [N, H]) by flat index into [B*T]."""
        hidden_BTH = self.teacher.body(*inputs)
        rows = hidden_BTH.flatten(0, 1)
        return rows.index_select(0, rows_A), rows.index_select(0, targets_N)
