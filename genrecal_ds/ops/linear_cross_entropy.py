"""Cross entropy through the STUDENT's head, in row chunks, with one dW.

Shapes: N loss rows, D student width, V student vocabulary.

One autograd Function takes the weight as ONE input: under ZeRO-3 a weight that is used twice in
a graph is gathered, and its gradient reduced, once per use; chunking inside keeps it at one.
"""

import torch
from torch import Tensor

from genrecal_ds.ops import IGNORE

CHUNK_BYTES = 1 << 28


def linear_cross_entropy(
    rows_ND: Tensor,
    labels_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    row_weights_N: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of row_weight * CE, CE per row [N] detached); rows with label -100 count nothing.

    Logits are softcap(scale * (rows @ weight.T + bias)), fp32. The weight gets a gradient only
    if it requires one (stage 3); frozen (stage 2) no [V, D] buffer is made.
    """
    return _LinearCrossEntropy.apply(
        rows_ND, weight_VD, bias_V, labels_N, row_weights_N.float(), scale, softcap
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, weight_VD, bias_V, labels_N, row_weights_N, scale, softcap):
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ce_N = rows_ND.new_zeros(labels_N.shape, dtype=torch.float32)
        d_rows = torch.zeros_like(rows_ND) if wants_rows else None
        # dW sums over chunks: in fp32, for a bf16 sum of many chunks loses its small ones.
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias else None
        chunk = max(1, CHUNK_BYTES // (8 * weight_VD.shape[0]))
        for start in range(0, labels_N.shape[0], chunk):
            part = slice(start, start + chunk)
            rows, labels = rows_ND[part], labels_N[part]
            valid = labels != IGNORE
            index = labels.clamp(min=0).unsqueeze(-1)
            logits = torch.nn.functional.linear(rows, weight_VD, bias_V).float() * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            log_q = logits.log_softmax(-1)
            ce_N[part] = -log_q.gather(-1, index).squeeze(-1) * valid
            if not (wants_rows or wants_weight or wants_bias):
                continue
            d_logits = log_q.exp()
            d_logits.scatter_add_(-1, index, torch.full_like(index, -1, dtype=d_logits.dtype))
            d_logits *= (row_weights_N[part] * valid).unsqueeze(-1) * scale
            if softcap is not None:
                d_logits *= 1 - (logits / softcap) ** 2
            d_low = d_logits.to(weight_VD.dtype)
            if d_rows is not None:
                d_rows[part] = d_low @ weight_VD
            if d_weight is not None:
                d_weight += d_low.T @ rows
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.mark_non_differentiable(ce_N)
        return ce_N @ row_weights_N, ce_N

    @staticmethod
    def backward(ctx, grad_loss, _):
        d_rows, d_weight, d_bias = ctx.saved_tensors
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in (
                (d_rows, d_rows.dtype if d_rows is not None else None),
                (d_weight, ctx.weight_dtype),
                (d_bias, ctx.weight_dtype),
            )
        ]
        return *scaled, None, None, None, None
