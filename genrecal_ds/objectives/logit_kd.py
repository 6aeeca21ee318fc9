"""Distils logits over the whole vocabulary, between models that share a tokenizer.

With p the teacher's distribution and q the student's, both softmax(logits / temperature):

    forward_kl  KL(p || q)                                 Hinton et al., arXiv 1503.02531
    reverse_kl  KL(q || p)                                 MiniLLM's direction
    skew_kl     KL(p || mix p + (1 - mix) q)               DistiLLM, arXiv 2402.03898
    jsd         mix KL(p || m) + (1 - mix) KL(q || m),     GKD, arXiv 2306.13649
                m = mix p + (1 - mix) q

The loss is not multiplied by temperature**2.

Shapes: n rows, V student vocabulary, W teacher vocabulary.
"""

import math

import torch
from torch import Tensor

from genrecal_ds.objectives.base import Ingredients
from genrecal_ds.objectives.student_kd import Distance, TokenKD
from genrecal_ds.recipe.stage_config import LossConfig


def build(parts: Ingredients) -> TokenKD:
    vocabulary = len(parts.encoders.student.tokenizer)
    return TokenKD(parts, divergence(parts.stage.losses, vocabulary))


def divergence(losses: LossConfig, vocabulary: int) -> Distance:
    """Return the recipe's divergence over the tokens that exist. The heads of two models with one
    tokenizer may be padded to different widths."""

    def distance(logits_nV: Tensor, teacher_nW: Tensor) -> Tensor:
        """Return the distance of each row, [n]."""
        log_p, log_q = (
            (logits[:, :vocabulary] / losses.temperature).log_softmax(-1)
            for logits in (teacher_nW, logits_nV)
        )
        if losses.divergence == "forward_kl":
            return _kl(log_p, log_q)
        if losses.divergence == "reverse_kl":
            return _kl(log_q, log_p)
        mix = losses.divergence_mix
        log_m = torch.logaddexp(log_p + math.log(mix), log_q + math.log(1 - mix))
        if losses.divergence == "skew_kl":
            return _kl(log_p, log_m)
        return mix * _kl(log_p, log_m) + (1 - mix) * _kl(log_q, log_m)

    return distance


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)
