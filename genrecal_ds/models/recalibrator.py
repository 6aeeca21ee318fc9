"""Defines the Recalibrator, which lets the teacher's language head read the student's features.

    [z_qs ; Proj-pre(z_al)] -> Rec-body -> Proj-post -> norm      (mixed, paper section 3.2)

Shapes: B batch, S student length, D student width, H teacher width, A teacher rows used,
P packed rows, C packed sequences, L longest of them, N loss rows.
"""

import copy
import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedConfig

from genrecal_ds.data.recalibrator_input import RecalibratorInput
from genrecal_ds.errors import UserError
from genrecal_ds.models.attention import Backend
from genrecal_ds.models.derived import num_heads
from genrecal_ds.models.packed_blocks import MODEL_TYPES, check_family, packed_forward
from genrecal_ds.models.packing import OURS
from genrecal_ds.ops.token_align import token_align
from genrecal_ds.recipe.config import RecalibratorConfig

FINAL_NORMS = ("norm", "embedding_norm")  # names of a decoder's last norm; the second is Lfm2's
# Text models whose own decoder class makes the blocks; others get Llama's blocks in their sizes.
OWN_BLOCKS = (
    *MODEL_TYPES, "gemma", "gemma2", "gemma3_text", "internlm3", "lfm2", "molmo2_text",
    "phi3", "phi4_multimodal", "qwen3_5_text",
)  # fmt: skip
NORM_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon")
Blocks = Literal["auto", "packed", "transformers"]
Positions = Literal["new", "own"]


class TokenAlign(nn.Module):
    """Holds Proj-pre, as a module of its own: ZeRO-3 gathers the weight for this call only."""

    def __init__(self, student_width: int, teacher_width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(student_width, teacher_width, dtype=dtype))

    def forward(
        self, student_hidden_BSD: Tensor, teacher_rows_AH: Tensor, layout: RecalibratorInput
    ) -> Tensor:
        return token_align(
            student_hidden_BSD, teacher_rows_AH, self.weight, layout.source_P, layout.uses_RU
        )


class Recalibrator(nn.Module):
    """Two projections around decoder blocks of the student's own configuration.

    It exists in training only. Source: paper section 3.2 and table 6 (depth 2).
    """

    def __init__(
        self,
        text_config: PreTrainedConfig,
        teacher_width: int,
        depth: int = 2,
        dtype: torch.dtype = torch.float32,
        blocks: Blocks = "auto",
        attention: Backend = "sdpa",
        positions: Positions = "new",
    ):
        """blocks: `packed` (packed_blocks.py), `transformers`' own, or `auto`: packed where it can.
        positions: `new` is the paper's NPE; `own`, an ablation, keeps the two models' positions.

        Raises UserError for packed blocks of a family that has none.
        """
        super().__init__()
        config = block_config(text_config, depth)
        self.packed_attention = choose_blocks(config.model_type, blocks, attention)
        self.positions = positions
        width = config.hidden_size
        self.proj_pre = TokenAlign(width, teacher_width, dtype)
        # dtype is given, never cast to later: .to(bf16) would round the rotary buffer too.
        self.blocks = build_decoder(config, dtype)
        self.proj_post = nn.Linear(width, teacher_width, bias=False, dtype=dtype)
        self.norm = nn.RMSNorm(teacher_width, eps=norm_eps(config), dtype=dtype)

    def initialize(self, std: float, teacher_norm_H: Tensor | None) -> None:
        """Draw blocks and projections from N(0, std), zero biases, copy the teacher's final norm.

        Other norms stay as their class makes them, because some multiply by 1 + weight.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if teacher_norm_H is not None:
            with torch.no_grad():
                self.norm.weight.copy_(teacher_norm_H)

    def forward(
        self, student_hidden_BSD: Tensor, teacher_rows_AH: Tensor, layout: RecalibratorInput
    ) -> Tensor:
        """Return rows [N, H] for layout.loss_rows, ready for the teacher's head.

        Proj-post and the norm run on the loss rows only; no other row is read.
        """
        packed_PD = self.proj_pre(student_hidden_BSD, teacher_rows_AH, layout)
        is_new = self.positions == "new"
        position_ids_P = layout.position_ids_P if is_new else layout.own_position_ids_P
        if self.packed_attention is None:
            rows_ND = self._transformers_blocks(packed_PD, layout, position_ids_P)
        else:
            rows_ND = packed_forward(
                self.blocks, packed_PD, position_ids_P, layout, layout.loss_rows,
                self.packed_attention,
            )  # fmt: skip
        return self.norm(self.proj_post(rows_ND))

    def _transformers_blocks(
        self, packed_PD: Tensor, layout: RecalibratorInput, position_ids_P: Tensor
    ) -> Tensor:
        """Run the family's own decoder over sequences right-padded to the longest.

        No padding mask is needed: under a causal mask no real row attends to the padding behind it.
        One row of all sequences under a block mask took 1.5 to 2.4 times as long.
        """
        num_sequences, longest = layout.num_sequences, layout.max_seqlen
        slot_P = layout.sequence_P * longest + layout.position_ids_P
        flat = packed_PD.new_zeros(num_sequences * longest, packed_PD.shape[-1])
        padded_CLD = flat.index_copy(0, slot_P, packed_PD).unflatten(0, (-1, longest))
        position_ids_CL = torch.arange(longest, device=packed_PD.device).expand(num_sequences, -1)
        mask_CL = None
        if self.positions == "own":
            flat_ids = position_ids_P.new_zeros(num_sequences * longest)
            position_ids_CL = flat_ids.index_copy(0, slot_P, position_ids_P).view(-1, longest)
            # Without a mask transformers takes every jump of the ids for the start of a sequence.
            mask_CL = torch.ones_like(position_ids_CL)
        hidden_CLD = self.blocks(
            inputs_embeds=padded_CLD,
            position_ids=position_ids_CL,
            attention_mask=mask_CL,
            use_cache=False,
        ).last_hidden_state
        return hidden_CLD.flatten(0, 1).index_select(0, slot_P[layout.loss_rows])


def unfilled(
    config: RecalibratorConfig, text_config: PreTrainedConfig, teacher_width: int,
    dtype: torch.dtype = torch.float32,
) -> Recalibrator:  # fmt: skip
    """The Recalibrator that a recipe asks for, with values that are not meant to be used.

    text_config: the student's. Raises UserError; see Recalibrator.
    """
    return Recalibrator(
        text_config, teacher_width, config.depth, dtype, config.blocks, config.attention,
        config.positions,
    )  # fmt: skip


def blocks_of(model_type: str) -> str:
    """The text model whose blocks the Recalibrator of such a student has."""
    return model_type if model_type in OWN_BLOCKS else "llama"


def choose_blocks(model_type: str, blocks: Blocks, attention: Backend) -> Backend | None:
    """The packed blocks' attention backend, or None for transformers' blocks. model_type: the
    student's text model's."""
    model_type = blocks_of(model_type)
    if blocks == "packed" or (blocks == "auto" and model_type in MODEL_TYPES):
        check_family(model_type)
        return attention
    if attention != "sdpa":
        raise UserError(
            f"recalibrator.attention: {attention} needs packed blocks, not transformers' own of "
            f"{model_type}; take sdpa"
        )
    return None


def _plain(text_config: PreTrainedConfig) -> PreTrainedConfig:
    """Llama's blocks in a text model's sizes, for one whose own blocks are not known to be plain.

    Experts, linear attention, compressed keys, or blocks that need more than hidden states: two new
    blocks between two projections need none of it."""
    heads = num_heads(text_config)
    return LlamaConfig(
        hidden_size=text_config.hidden_size,
        intermediate_size=4 * text_config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text_config, "num_key_value_heads", None) or heads,
        head_dim=max(2, text_config.hidden_size // heads // 2 * 2),
        rms_norm_eps=norm_eps(text_config),
        initializer_range=getattr(text_config, "initializer_range", 0.02),
        rope_parameters=getattr(text_config, "rope_parameters", None),
    )


def block_config(text_config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The student's text config with `depth` full-attention blocks and plain RoPE of its theta.

    The blocks drop nothing (the paper's do not) and have no stretched RoPE (yarn, longrope, ..):
    they are new, and longrope's angles would depend on what else is in the batch.
    """
    is_own = text_config.model_type in OWN_BLOCKS
    config = copy.deepcopy(text_config if is_own else _plain(text_config))
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * depth
    elif hasattr(config, "sliding_window"):
        config.sliding_window = None  # Mistral's decoder slides wherever it is set
    config.use_sliding_window = False
    if hasattr(config, "use_bidirectional_attention"):
        config.use_bidirectional_attention = False  # PaliGemma's blocks would see the padding too
    for name, value in list(vars(config).items()):
        if "drop" in name and type(value) in (int, float):  # dropout, resid_pdrop, layerdrop
            setattr(config, name, 0.0)
    if config._attn_implementation == OURS:  # asks each layer for its samples; these have none
        config._attn_implementation = "sdpa"
    # The embedding is never used; one row keeps its construction cheap.
    config.vocab_size, config.pad_token_id = 1, None
    rope = dict(getattr(config, "rope_parameters", None) or {})
    is_by_kind = "full_attention" in rope  # Gemma3 has one theta for each kind of layer
    rope = rope["full_attention"] if is_by_kind else rope
    plain = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    # A Qwen-VL block needs sections; equal ids on all axes are plain RoPE. Phi-3 and Qwen3.5 turn
    # only the first of a head's numbers.
    kept = ("mrope_section", "partial_rotary_factor")
    plain |= {key: rope[key] for key in kept if rope.get(key) is not None}
    config.rope_parameters = {"full_attention": plain} if is_by_kind else plain
    return config


def norm_eps(config: PreTrainedConfig) -> float:
    """The eps of a family's norms, by whichever name its config has."""
    names = (name for name in NORM_EPS if getattr(config, name, None) is not None)
    return getattr(config, next(names, ""), 1e-6)


def build_decoder(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The family's own decoder class, without embedding and without its final norm."""
    decoder = AutoModel.from_config(config, dtype=dtype)
    decoder = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
    norm = next((name for name in FINAL_NORMS if hasattr(decoder, name)), None)
    if not hasattr(decoder, "embed_tokens") or norm is None:
        raise UserError(
            f"student text model {type(decoder).__name__}: no decoder adapter for it yet"
        )
    for name, module in decoder.named_children():
        # The embedding; in Phi-4-multimodal, whose decoder is its whole body, all encoders too.
        if name not in ("layers", norm) and any(True for _ in module.parameters()):
            setattr(decoder, name, None)
    setattr(decoder, norm, nn.Identity())  # the Recalibrator has its own norm, after Proj-post
    return decoder


def save_recalibrator(state: dict[str, Tensor], folder: Path, facts: dict) -> None:
    """Write weights and the facts that load_recalibrator checks (widths, depth)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "recalibrator.safetensors")
    (folder / "recalibrator.json").write_text(json.dumps(facts, indent=2) + "\n")


def load_recalibrator(module: Recalibrator, folder: Path) -> None:
    """Fill a Recalibrator from a folder. Raises UserError when it is of another shape."""
    module.load_state_dict(load_file(check_recalibrator(module, folder)))


def check_recalibrator(module: Recalibrator, folder: Path) -> Path:
    """The file of its weights, from its header. Raises UserError when it is of another shape."""
    path = folder / "recalibrator.safetensors"
    if not path.is_file():
        raise UserError(f"recalibrator: {folder} has no recalibrator.safetensors")
    with safe_open(path, framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if stored != expected:
        raise UserError(f"recalibrator: {path} was trained for another pair or depth")
    return path
