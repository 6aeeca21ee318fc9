"""Computes the cross entropy through the STUDENT's head, in row chunks, with one dW.

Shapes: N loss rows, D student width, V student vocabulary.

One autograd Function takes the weight as ONE input. Under ZeRO-3 a weight that is used twice in a
graph is gathered twice, and its gradient is reduced twice; chunking inside the Function keeps both
at one. The forward forms all gradients while the weight is gathered: backward needs no weight.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genrecal_ds import IGNORE
from genrecal_ds.ops.checks import check_labels, expect
from genrecal_ds.ops.choice import chosen
from genrecal_ds.ops.gemm import add_product_, project_, scaled, wide
from genrecal_ds.ops.head_loss.chunked import chunk_size, epilogue_of
from genrecal_ds.ops.head_loss.contract import Head
from genrecal_ds.ops.head_loss.epilogue import Chunk, Coefficients

CE = [Coefficients(on_q=1.0, on_p=0.0, on_label=1.0)]


def linear_cross_entropy(
    rows_ND: Tensor,
    labels_N: Tensor,
    head: Head,
    row_weights_N: Tensor,
    *,
    impl: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (sum of row_weight * CE, CE per row [N] detached); label -100 adds nothing.

    rows_ND: the head's dtype; row_weights_N: any float dtype. Losses are fp32, in nats. Rows,
    weight and bias each get a gradient only if they require one: a frozen head (stage 2) costs
    no [V, D] buffer. Raises ValueError naming the argument that does not fit.
    """
    rows, width = rows_ND.shape
    expect("rows_ND", rows_ND, (rows, width), head.weight_VH)
    expect("head.weight_VH", head.weight_VH, (head.weight_VH.shape[0], width), rows_ND)
    expect("labels_N", labels_N, (rows,), rows_ND, torch.int64)
    expect("row_weights_N", row_weights_N, (rows,), rows_ND, None)
    if head.bias_V is not None:
        expect("head.bias_V", head.bias_V, (head.weight_VH.shape[0],), rows_ND)
    check_labels(labels_N, head.weight_VH.shape[0])
    return _LinearCrossEntropy.apply(
        rows_ND, head.weight_VH, head.bias_V, labels_N, row_weights_N, head,
        chosen(impl, rows_ND), torch.is_grad_enabled(),
    )  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows_ND, weight_VD, bias_V, labels_N, row_weights_N, head, implementation, has_grad
    ):
        # `head` gives scale and softcap; autograd knows its tensors only as the other inputs.
        head = head._replace(weight_VH=weight_VD, bias_V=bias_V)
        epilogue = epilogue_of(implementation)
        # needs_input_grad ignores no_grad, and inside a Function gradients are always off.
        wants = [has_grad and needed for needed in ctx.needs_input_grad[:3]]
        wants_rows, wants_weight, wants_bias = wants
        fp, num_rows, vocabulary = wide(weight_VD), len(labels_N), weight_VD.shape[0]
        row_weights_N = row_weights_N.to(fp) * (labels_N != IGNORE)
        ce_N = rows_ND.new_zeros(num_rows, dtype=fp)
        d_rows = torch.empty_like(rows_ND) if wants_rows else None
        d_weight = torch.zeros_like(weight_VD, dtype=fp) if wants_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=fp) if wants_bias else None
        size = chunk_size(num_rows, 1, False, weight_VD)
        logits = weight_VD.new_empty(min(size, num_rows), vocabulary, dtype=fp)
        in_place = weight_VD.dtype == fp or not any(wants)
        dlogits = logits if in_place else torch.empty_like(logits, dtype=weight_VD.dtype)
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            rows, logits_nV = rows_ND[part], logits[: len(rows_ND[part])]
            d_nV = dlogits[: len(rows)]
            project_(logits_nV, rows, weight_VD)
            chunk = Chunk(
                logits_nV[None], None, labels_N[part], row_weights_N[part],
                CE, head, any(wants), d_nV,
            )  # fmt: skip
            stats = epilogue(chunk)
            ce_N[part] = stats.lse_Kn[0] - stats.label_logit_Kn[0]
            if d_rows is not None:
                d_rows[part] = torch.mm(d_nV, weight_VD)
            if d_weight is not None:
                add_product_(d_weight, d_nV, rows)
            if d_bias is not None:
                d_bias += d_nV.sum(0, dtype=fp)
        ce_N = ce_N.where(labels_N != IGNORE, 0)
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.mark_non_differentiable(ce_N)
        return ce_N @ row_weights_N, ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        gradients = [
            None if gradient is None else scaled(gradient, grad_loss, ctx.weight_dtype)
            for gradient in ctx.saved_tensors
        ]
        return *gradients, None, None, None, None, None
