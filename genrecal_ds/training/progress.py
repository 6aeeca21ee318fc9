"""Shows a person how a stage trains: a live bar, memory, and a profiler on request."""

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from genrecal_ds import dist

SHOWN = ("loss", "ar", "kl", "regular_ar", "regular_kl", "regular_mse", "student_ce")
LINES_PER_STAGE = 20  # when the output is a file, not a terminal


class Progress:
    """A bar on a terminal, a line now and then in a log file; on the main rank only."""

    def __init__(self, name: str, first_step: int, num_steps: int):
        self.name, self.num_steps = name, num_steps
        console = Console(file=sys.stdout)
        self._is_live = dist.is_main() and console.is_terminal
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[terms]}"),
            console=console, disable=not self._is_live,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=num_steps, completed=first_step, terms="")

    def update(self, step: int, record: dict[str, Any]) -> None:
        metrics, rates = record["metrics"], record["tokens_per_second"]
        terms = "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics)
        terms += f"  lr {record['lr']:.1e}  |g| {record.get('gradient_norm', math.nan):.2f}"
        speed = "  ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        text = f"{terms}  tok/s: {speed}  {record['peak_memory_gib']:.2f} GiB"
        self._bar.update(self._task, completed=step, terms=text)
        is_due = step % max(1, self.num_steps // LINES_PER_STAGE) == 0 or step == self.num_steps
        if dist.is_main() and not self._is_live and is_due:
            left = self._bar.tasks[self._task].time_remaining
            eta = f"{left:.0f} s left" if left is not None else ""
            print(f"{self.name} {step}/{self.num_steps}  {eta}  {text}", flush=True)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._bar.stop()


class Profiler:
    """`profile=a:b`: a torch trace (and on CUDA a memory snapshot) of steps a..b-1."""

    def __init__(self, steps: str | None, folder: Path):
        self.first, self.last = map(int, steps.split(":")) if steps else (-1, -1)
        self.folder = folder / "profile"
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        if step == self.first:
            if torch.cuda.is_available():
                torch.cuda.memory._record_memory_history()
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()
        yield
        if self._profiler is not None and step + 1 == self.last:
            self._write(self._profiler)
            self._profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank{dist.rank()}.json.gz"))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank{dist.rank()}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


def peak_memory_gib() -> float:
    """Return this rank's peak: the device's allocator on CUDA, resident memory on the CPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return host_memory_gib()


def host_memory_gib() -> float:
    """Return the most that this process had resident so far; pages of read files count."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
