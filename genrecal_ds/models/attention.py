"""Computes causal attention over packed rows of several spans, without padding outside it.

Shapes: Q query rows, K key rows, h query heads, g key and value heads, E head width, C spans.

The recipe chooses the backend. A backend that cannot run is an error, never replaced by another:
    sdpa     torch's scaled_dot_product_attention; spans are padded for this call alone
    varlen   torch.nn.attention.varlen, CUDA with bf16 or fp16
    flash    the flash-attn package, CUDA with bf16 or fp16
"""

import importlib.util
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genrecal_ds.errors import UserError

Backend = Literal["sdpa", "varlen", "flash"]


class Spans(NamedTuple):
    """Which query rows attend to which keys: span c's queries to span c's keys, causally.

    The last query of a span stands on the span's last key. With as many queries as keys this is
    plain causal attention. Lengths are known on the CPU, so nothing waits for the device.
    """

    cu_queries: Tensor  # int32 [C + 1]
    cu_keys: Tensor  # int32 [C + 1]
    max_queries: int
    max_keys: int


def attend(
    q_QhE: Tensor, k_KgE: Tensor, v_KgE: Tensor, spans: Spans, scale: float, backend: Backend
) -> Tensor:
    """Softmax(q k^T * scale) v within each span, [Q, h, E]; g must divide h."""
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_QhE, k_KgE, v_KgE, spans.cu_queries, spans.cu_keys,
            spans.max_queries, spans.max_keys, softmax_scale=scale, causal=True,
        )  # fmt: skip
    groups = q_QhE.shape[1] // k_KgE.shape[1]
    k_KhE, v_KhE = k_KgE.repeat_interleave(groups, 1), v_KgE.repeat_interleave(groups, 1)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            q_QhE, k_KhE, v_KhE, spans.cu_queries, spans.cu_keys,
            spans.max_queries, spans.max_keys, scale=scale, window_size=(-1, 0),
        )  # fmt: skip
    return _padded(q_QhE, k_KhE, v_KhE, spans, scale)


def check_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse, before training, a backend that cannot run here. Raises UserError."""
    if backend == "sdpa":
        return
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("recalibrator.attention: flash needs flash-attn: pip install flash-attn")
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"recalibrator.attention: {backend} needs a CUDA device and bf16, not {device.type} "
            f"and {dtype}; take sdpa"
        )


def _padded(q_QhE: Tensor, k_KhE: Tensor, v_KhE: Tensor, spans: Spans, scale: float) -> Tensor:
    num_spans = spans.cu_queries.shape[0] - 1
    query_slots = _slots(spans.cu_queries, spans.max_queries, q_QhE.shape[0])
    key_slots = _slots(spans.cu_keys, spans.max_keys, k_KhE.shape[0])

    def pad(rows: Tensor, slots: Tensor, longest: int) -> Tensor:
        flat = rows.new_zeros(num_spans * longest, *rows.shape[1:])
        return flat.index_copy(0, slots, rows).unflatten(0, (num_spans, longest)).transpose(1, 2)

    q_ChLE = pad(q_QhE, query_slots, spans.max_queries)
    k_ChLE, v_ChLE = (pad(rows, key_slots, spans.max_keys) for rows in (k_KhE, v_KhE))
    if spans.cu_queries is spans.cu_keys:  # no real row sees the padding behind it
        out_ChLE = scaled_dot_product_attention(q_ChLE, k_ChLE, v_ChLE, is_causal=True, scale=scale)
    else:
        ahead_C11 = (spans.cu_keys.diff() - spans.cu_queries.diff())[:, None, None]
        last_key_CL1 = ahead_C11 + torch.arange(spans.max_queries, device=q_QhE.device)[:, None]
        mask_CLL = torch.arange(spans.max_keys, device=q_QhE.device) <= last_key_CL1
        out_ChLE = scaled_dot_product_attention(
            q_ChLE, k_ChLE, v_ChLE, attn_mask=mask_CLL[:, None], scale=scale
        )
    return out_ChLE.transpose(1, 2).flatten(0, 1).index_select(0, query_slots)


def _slots(cu_rows: Tensor, longest: int, num_rows: int) -> Tensor:
    """int64 [rows]: where each packed row lies when every span is padded to the longest."""
    lengths = cu_rows.diff()
    span = torch.repeat_interleave(
        torch.arange(len(lengths), device=cu_rows.device), lengths, output_size=num_rows
    )
    return torch.arange(num_rows, device=cu_rows.device) + span * longest - cu_rows[span]
