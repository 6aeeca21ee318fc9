"""Logit distillation between models that share a tokenizer: forward, reverse or skewed KL, JSD.

Forward KL is the classic (Hinton et al., arXiv 1503.02531), reverse KL MiniLLM's direction, skewed
KL DistiLLM's (arXiv 2402.03898), JSD GKD's (arXiv 2306.13649); see ops/head_loss/contract.py.
"""

from torch import Tensor

from genrecal_ds.objectives.base import Ingredients
from genrecal_ds.objectives.student_kd import Distance, TokenKD
from genrecal_ds.ops.head_loss.contract import Divergence
from genrecal_ds.ops.head_loss.reference import divergence_of
from genrecal_ds.recipe.stage_config import LossConfig


def build(parts: Ingredients) -> TokenKD:
    vocabulary = len(parts.encoders.student.tokenizer)
    return TokenKD(parts, divergence(parts.stage.losses, vocabulary))


def divergence(losses: LossConfig, vocabulary: int) -> Distance:
    """Over the tokens that exist: heads of one tokenizer may be padded differently."""
    chosen = Divergence(losses.divergence, losses.divergence_mix)

    def distance(logits_nV: Tensor, teacher_nW: Tensor) -> Tensor:
        """[n], of softmax(logits / temperature)."""
        shared = [logits[:, :vocabulary] for logits in (teacher_nW, logits_nV)]
        return divergence_of(*shared, chosen, losses.temperature)

    return distance
