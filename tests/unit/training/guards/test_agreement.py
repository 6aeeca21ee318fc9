"""The numbers that ranks exchange before a step, without ranks."""

import numpy as np
import pytest

from genrecal_ds.data.plan import PADDING
from genrecal_ds.training.guards.agreement import batch_digest

pytestmark = pytest.mark.unit


def test_the_digest_knows_the_set_and_nothing_else():
    random = np.random.default_rng(0)
    ids = random.permutation(100_000)[:4096].tolist()
    digest = batch_digest(ids)
    assert digest == batch_digest(random.permutation(ids).tolist() + [PADDING] * 7)
    parts = [batch_digest(ids[rank::8]) for rank in range(8)]
    assert digest == sum(parts)  # ranks add up, exactly in float64
    assert float(digest) == digest
    assert digest != batch_digest(ids[:-1])
    assert digest != batch_digest([*ids[:-1], ids[0]])  # one lost, one twice
    assert digest != batch_digest([*ids[:-1], ids[-1] + 1])
    assert batch_digest([]) == 0


def test_equal_codes_are_told_from_unequal_ones_by_two_sums():
    """As agree does, at the largest world and the largest code, in float64."""
    for world in (2, 3, 4096):
        code = float(2**20 - 1)
        codes = [code] * world
        assert sum(c * c for c in codes) * world == sum(codes) ** 2
        codes[-1] -= 1
        assert sum(c * c for c in codes) * world != sum(codes) ** 2
