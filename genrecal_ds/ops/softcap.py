"""The softcap that some families put behind their heads: cap * tanh(x / cap).

Shapes: n rows, V vocabulary.
"""

import torch
from torch import Tensor


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """The capped logits; the logits themselves where the family has no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def softcap_(logits_nV: Tensor, cap: float | None, needs_slope: bool) -> Tensor | None:
    """Cap the logits in place. Returns the cap's slope [n, V] where it is wanted and not 1."""
    if cap is None:
        return None
    logits_nV.div_(cap).tanh_()
    slope_nV = 1 - logits_nV.square() if needs_slope else None  # of cap tanh(x / cap): 1 - tanh^2
    logits_nV.mul_(cap)
    return slope_nV
