"""The epilogue of the baselines: any Divergence, any temperature. Plain torch, chunk by chunk.

Shapes: K passes, n rows of a chunk, V vocabulary.

With q = softmax(s / tau), every divergence D has d D / d s = q (g - sum q g) / tau, where
g = d D / d q up to a constant:

    forward_kl  -p / q                     reverse_kl  log(q / p)
    skew_kl     -(1 - mix) p / m           jsd         (1 - mix) log(q / m)

CE is always taken at temperature 1; only the divergence sees tau.
"""

import math

import torch
from torch import Tensor

from genrecal_ds.ops.head_loss.contract import Divergence
from genrecal_ds.ops.head_loss.epilogue import Chunk, RowStats, block_rows, columns_of, transform_


def variant_epilogue_(chunk: Chunk, divergence: Divergence, temperature: float) -> RowStats:
    """As softmax_epilogue_. Of Coefficients CE's weight is on_label, the divergence's on_p."""
    student_KnV, teacher_nV, head = chunk.student_KnV, chunk.teacher_nV, chunk.head
    assert teacher_nV is not None
    columns_n, is_bad_n = columns_of(chunk.labels_n, student_KnV.shape[-1])
    dlogits_KnV = chunk.dlogits_mV.view(student_KnV.shape) if chunk.needs_grad else student_KnV
    num_passes, num_rows, _ = student_KnV.shape
    kl_Kn = student_KnV.new_empty(num_passes, num_rows)
    lse_Kn, label_logit_Kn = torch.empty_like(kl_Kn), torch.empty_like(kl_Kn)
    block = block_rows(student_KnV)
    transform_(teacher_nV, head, needs_slope=False)
    top1_Kn = columns_n.new_empty(num_passes, num_rows)
    for k, coefficient in enumerate(chunk.coefficients):
        for start in range(0, num_rows, block):
            part = slice(start, start + block)
            logits_bV, label_b1 = student_KnV[k, part], columns_n[part].unsqueeze(-1)
            slope_bV = transform_(logits_bV, head, chunk.needs_grad)
            top1_Kn[k, part] = logits_bV.argmax(-1)
            lse_Kn[k, part] = logits_bV.logsumexp(-1)
            label_logit_Kn[k, part] = logits_bV.gather(-1, label_b1).squeeze(-1)
            log_p_bV = (teacher_nV[part] / temperature).log_softmax(-1)
            log_q_bV = (logits_bV / temperature).log_softmax(-1)
            kl_Kn[k, part], gradient_bV = value_and_gradient(log_p_bV, log_q_bV, divergence)
            if not chunk.needs_grad:
                continue
            d_bV = logits_bV.sub_(lse_Kn[k, part].unsqueeze(-1)).exp_().mul_(coefficient.on_label)
            d_bV.add_(gradient_bV, alpha=coefficient.on_p / temperature)
            on_label_b1 = d_bV.new_full((), -coefficient.on_label).expand(label_b1.shape)
            d_bV.scatter_add_(-1, label_b1, on_label_b1)
            d_bV.mul_(chunk.row_weights_n[part].unsqueeze(-1) * head.scale)
            if slope_bV is not None:
                d_bV.mul_(slope_bV)
            dlogits_KnV[k, part] = d_bV
    label_logit_Kn.masked_fill_(is_bad_n, float("nan"))
    return RowStats(lse_Kn, label_logit_Kn, kl_Kn, top1_Kn, teacher_nV.argmax(-1))


def value_and_gradient(
    log_p: Tensor, log_q: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """(D per row, d D / d logits of q) of log-probabilities [.., V]."""
    p, q, mix = log_p.exp(), log_q.exp(), divergence.mix
    if divergence.name == "forward_kl":  # q g = -p has no quotient that could overflow
        return (p * (log_p - log_q)).sum(-1), q - p
    if divergence.name == "reverse_kl":
        g = log_q - log_p
        value = (q * g).sum(-1)
        return value, q * (g - value.unsqueeze(-1))
    log_m = torch.logaddexp(log_p + math.log(mix), log_q + math.log(1 - mix))
    if divergence.name == "skew_kl":
        g = -(1 - mix) * (log_p - log_m).exp()
        value = (p * (log_p - log_m)).sum(-1)
    else:
        g = (1 - mix) * (log_q - log_m)
        value = mix * (p * (log_p - log_m)).sum(-1) + (q * g).sum(-1)
    return value, q * (g - (q * g).sum(-1, keepdim=True))
