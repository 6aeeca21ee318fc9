"""Records steps that went wrong, with their samples: RUN/STAGE/faults/rank0.jsonl, ...

All ranks skip a step together. The gradient's norm is global, so a NaN on one rank is a NaN on
every rank, and DeepSpeed then leaves weights and optimizer state unchanged.
"""

import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import FaultConfig

WINDOW = 128  # logged steps that a spike is measured against
MIN_HISTORY = 32


class Faults:
    """Skipped steps and spikes of one stage."""

    def __init__(self, folder: Path, config: FaultConfig, reader: ShardReader):
        self.folder, self.config, self.reader = folder, config, reader
        self.in_a_row = 0
        self.skipped = 0
        self._history: dict[str, deque[float]] = {}

    def check_step(
        self, step: int, micro: Sequence[PairBatch], losses: Sequence[float], is_applied: bool
    ) -> None:
        """Note a step whose update was left out. losses: this rank's, one per micro-batch.

        Raises UserError on every rank when too many steps in a row were skipped.
        """
        if is_applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        self._write("skipped", step, micro, {"losses": [_finite(loss) for loss in losses]})
        if dist.is_main():
            print(
                f"step {step + 1}: loss or gradient is not finite on some rank; update skipped "
                f"on all, samples named in {self.folder}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        if self.in_a_row >= self.config.max_skipped:
            raise UserError(
                f"{self.in_a_row} steps in a row had no finite gradient "
                f"(faults.max_skipped {self.config.max_skipped}); see {self.folder}, then lower "
                "optimizer.lr or resume from an older checkpoint"
            )

    def check_spikes(
        self, step: int, micro: Sequence[PairBatch], values: dict[str, float]
    ) -> list[str]:
        """Name the values (the same on every rank) that rose above their usual range."""
        spikes = []
        for name, value in values.items():
            history = self._history.setdefault(name, deque(maxlen=WINDOW))
            if self.config.spike_sigmas and len(history) >= MIN_HISTORY:
                mean, sigma = statistics.fmean(history), statistics.pstdev(history)
                if value > mean + self.config.spike_sigmas * max(sigma, 1e-6 * abs(mean)):
                    spikes.append(name)
                    usual = {"value": value, "mean": mean, "sigma": sigma}
                    self._write(f"spike of {name}", step, micro, usual)
            if math.isfinite(value):
                history.append(value)
        return spikes

    def _write(
        self, kind: str, step: int, micro: Sequence[PairBatch], facts: dict[str, object]
    ) -> None:
        """Write one line of this rank, with the keys of its samples."""
        samples = [sample for batch in micro for sample in batch.sample_ids]
        read = self.reader.read_many(samples)
        keys = [str(sample) if isinstance(sample, BadSample) else sample.key for sample in read]
        line = {"kind": kind, "step": step + 1, **facts, "samples": samples, "keys": keys}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{dist.rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def _finite(value: float) -> float | str:
    """Return NaN and infinity as text: JSON has neither."""
    return value if math.isfinite(value) else str(value)
