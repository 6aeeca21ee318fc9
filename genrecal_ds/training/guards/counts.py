"""Counts what became of a stage's samples, over all ranks: seen, left out, damaged, shortened."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.errors import UserError

# If no sample is usable after so many, the recipe has a mistake.
MIN_SEEN = 100
# A short run may meet a few damaged samples before a rate means anything.
MIN_UNREADABLE = 10
MAX_SHOWN = 20  # reasons with a key each; some hold a processor's own words


class SampleCounts:
    """Counts that every rank agrees on, because they travel with the step's row counts."""

    NAMES = ("seen", "unusable", "unreadable", "truncated")

    def __init__(self, max_unreadable: float) -> None:
        self.max_unreadable = max_unreadable
        self.total = dict.fromkeys(self.NAMES, 0)
        self.reasons: Counter[str] = Counter()  # of this rank, for the log

    def of(self, micro: Sequence[PairBatch]) -> list[int]:
        """Return this rank's counts of one step, in the order of NAMES; print damaged keys, and
        the first key of each reason for which a sample is unusable."""
        for batch in micro:
            for reason, key in zip(batch.unusable, batch.unusable_keys, strict=False):
                if reason not in self.reasons and len(self.reasons) < MAX_SHOWN:
                    print(
                        f"rank {dist.rank()}: left out key {key}: {reason}; more are counted only",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    self.reasons[reason] += 0
            self.reasons.update(batch.unusable)
            for line in batch.unreadable:
                self.reasons["unreadable"] += 1
                print(f"rank {dist.rank()}: skipped {line}", file=sys.stderr, flush=True)
        return [
            sum(len(batch.sample_ids) for batch in micro),
            sum(len(batch.unusable) for batch in micro),
            sum(len(batch.unreadable) for batch in micro),
            sum(batch.num_truncated for batch in micro),
        ]

    def add(self, values: Sequence[float]) -> None:
        """Add a step's counts of all ranks. Raises UserError, on every rank alike, over the limit.

        A few damaged samples are left out and counted. Many mean that the data has changed, and
        the run would train on something else.
        """
        for name, value in zip(self.NAMES, values, strict=True):
            self.total[name] += int(value)
        seen, unreadable = self.total["seen"], self.total["unreadable"]
        if seen >= MIN_SEEN and self.total["unusable"] == seen:
            reasons = ", ".join(reason for reason, _ in self.reasons.most_common(3))
            raise UserError(f"none of the first {seen} samples can be used: {reasons}")
        allowed = max(MIN_UNREADABLE, self.max_unreadable * seen) if self.max_unreadable else 0
        if unreadable > allowed:
            raise UserError(
                f"{unreadable} of {seen} samples are damaged, more than data.max_unreadable "
                f"{self.max_unreadable}; the skipped ones are named above, all of them by "
                "python -m data_tools.verify"
            )

    def state(self) -> dict[str, Any]:
        """Return the counts for the checkpoint."""
        return dict(self.total)

    def load(self, state: dict[str, Any]) -> None:
        self.total |= {name: int(state.get(name, 0)) for name in self.NAMES}
