"""Collects what a step reports: sums with counts, reduced once over ranks, and phases' seconds.

A mean is kept as (sum, count) until the end: a mean of means depends on how a batch was split.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genrecal_ds import dist


@dataclass
class Report:
    """Detached sums of one or more micro-batches.

    means: name -> (sum, count), logged as sum / count. norms: name -> sum of squares, logged as
    its root. Keys must not depend on the data, because ranks reduce all in one flat tensor.
    """

    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def add_rows(self, name: str, values_N: Tensor, boundary_N: Tensor, valid_N: Tensor) -> None:
        """Add a per-row quantity as three means: all rows, boundary rows, other rows.

        A mean over all rows hides whether the boundary row is learnt, the one row per turn that
        depends on the student.
        """
        values_N = values_N.detach().float()
        for suffix, rows_N in (
            ("", valid_N),
            ("_boundary", valid_N & boundary_N),
            ("_other", valid_N & ~boundary_N),
        ):
            self.means[name + suffix] = ((values_N * rows_N).sum(), rows_N.sum().float())

    def __add__(self, other: "Report") -> "Report":
        means = dict(self.means)
        for name, (total, count) in other.means.items():
            old_total, old_count = means.get(name, (0.0, 0.0))
            means[name] = (old_total + total, old_count + count)
        norms = dict(self.norms)
        for name, square in other.norms.items():
            norms[name] = norms.get(name, 0.0) + square
        return Report(means, norms)

    def reduce(self) -> dict[str, float]:
        """Sum over ranks and divide. One collective: every rank must call it."""
        flat = [part for pair in self.means.values() for part in pair] + list(self.norms.values())
        if not flat:
            return {}
        values = dist.sum_over_ranks(torch.stack([torch.as_tensor(v).float() for v in flat]))
        numbers = iter(values.tolist())
        result = {}
        for name in self.means:
            total, count = next(numbers), next(numbers)
            if count:
                result[name] = total / count
        for name in self.norms:
            result[name] = next(numbers) ** 0.5
        return result


class Clock:
    """Seconds per phase of the current step. The code that does the work names the phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.precise = False  # wait for the device at phase ends; on logged steps only
        self.current = ""  # the phase that began last; the watchdog reads it and the count
        self.phases_begun = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.current = name
        self.phases_begun += 1
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """Return the seconds so far and start again at 0."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _now(self) -> float:
        if self.precise:
            dist.synchronize()
        return time.perf_counter()
