"""Divergences and their gradients through a head, against their formulas in double precision."""

import pytest
import torch

from genrecal_ds.objectives.logit_kd import divergence
from genrecal_ds.ops.head_loss import Head
from genrecal_ds.ops.linear_distance import linear_distance
from genrecal_ds.recipe.stage_config import LossConfig

pytestmark = pytest.mark.unit
ROWS, WIDTH, VOCABULARY, PADDED = 61, 24, 507, 520
HEADS = {"plain": (1.0, None), "all": (0.7, 5.0)}  # scale and softcap; "all" has a bias too


@pytest.mark.parametrize("name, mix", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("skew_kl", 0.1),
                                       ("jsd", 0.3), ("jsd", 0.5)])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", HEADS)
def test_divergences_equal_their_formulas(name, mix, temperature, kind):
    generator = torch.Generator().manual_seed(0)
    scale, softcap = HEADS[kind]
    weight = torch.randn(PADDED, WIDTH, generator=generator) / WIDTH**0.5
    bias = torch.linspace(-1, 1, PADDED) if kind == "all" else None
    rows = torch.randn(ROWS, WIDTH, generator=generator)
    teacher = torch.randn(ROWS, VOCABULARY, generator=generator)  # another padding than the head's
    leaf = rows.double().requires_grad_()
    logits = (leaf @ weight.double().T + (0 if bias is None else bias.double())) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    p = (teacher.double() / temperature).softmax(-1)
    q = (logits[:, :VOCABULARY] / temperature).softmax(-1)
    m = mix * p + (1 - mix) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    expected = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, m),
        "jsd": lambda: mix * kl(p, m) + (1 - mix) * kl(q, m),
    }[name]()
    expected.sum().backward()

    losses = LossConfig(divergence=name, divergence_mix=mix, temperature=temperature)
    distance, own = divergence(losses, VOCABULARY), rows.clone().requires_grad_()
    total, found = linear_distance(
        own,
        Head(weight, bias, scale, softcap),
        lambda logits_nV, part: distance(logits_nV, teacher[part]),
    )
    total.backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.grad.double(), leaf.grad, rtol=1e-4, atol=2e-6)
