"""Computes the 95 % interval of a mean score, Wilson's or the bootstrap's."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES, SEED = 2000, 0


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion; (0, 1) of nothing. Wilson 1927."""
    if total == 0:
        return 0.0, 1.0
    share, squared = correct / total, z * z
    center = (share + squared / (2 * total)) / (1 + squared / total)
    spread = z * math.sqrt(share * (1 - share) / total + squared / (4 * total**2))
    half = spread / (1 + squared / total)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, from resamples of a fixed seed."""
    if not values:
        return 0.0, 1.0
    generator = np.random.default_rng(SEED)
    numbers = np.asarray(values, float)
    # Row by row: a hundred thousand samples times two thousand would be gigabytes.
    size = len(numbers)
    means = [numbers[generator.integers(size, size=size)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def score(values: Sequence[float]) -> dict[str, float | int]:
    """{"score", "n", "low", "high"}: Wilson's interval where every value is 0 or 1, else the
    bootstrap's."""
    if all(value in (0, 1) for value in values):
        low, high = wilson(int(sum(values)), len(values))
    else:
        low, high = bootstrap(values)
    mean = sum(values) / len(values) if values else 0.0
    return {"score": mean, "n": len(values), "low": low, "high": high}


def scores_by_kind(kinds: Sequence[str], values: Sequence[float]) -> dict[str, dict]:
    """`overall` first, then every kind of question."""
    result = {"overall": score(values)}
    for kind in sorted(set(kinds)):
        result[kind] = score([v for k, v in zip(kinds, values, strict=True) if k == kind])
    return result
