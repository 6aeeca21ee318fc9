"""Scores of arms over seeds as tables, partial ones said to be so."""

import json
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from genrecal_ds.ablate.grid import Grid, Run


class Row(NamedTuple):
    """One arm. Scores are shares of 1; paired: of the same seeds, to the table's first arm."""

    arm: str
    scores: dict[int, float]  # seed: score
    num_seeds: int  # asked for
    paired: tuple[float, float, float] | None  # mean difference and its 95 % interval
    seconds: float | None  # of training, on average

    @property
    def mean(self) -> float | None:
        return fmean(self.scores.values()) if self.scores else None


def tables_of(grid: Grid, runs: Sequence[Run]) -> dict[str, list[Row]]:
    """{title: rows}, from the score files that are there."""
    scores: dict[str, dict[int, float]] = {arm: {} for arm in grid.arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in grid.arms}
    for run in runs:
        if run.score.is_file():
            found = json.loads(run.score.read_text())["scores"]
            scores[run.arm][run.seed] = found["overall"]["score"]
            seconds[run.arm].append(json.loads((run.folder / "seconds.json").read_text()))
    tables = grid.tables or {"All arms": tuple(grid.arms)}
    return {
        title: [
            Row(
                arm,
                scores[arm],
                len(grid.seeds),
                paired(scores[arm], scores[arms[0]]) if arm != arms[0] else None,
                fmean(seconds[arm]) if seconds[arm] else None,
            )
            for arm in arms
        ]
        for title, arms in tables.items()
    }


def paired(scores: dict[int, float], others: dict[int, float]) -> tuple[float, float, float] | None:
    """(mean difference, low, high): Student's t over the seeds that both have, 2 at least."""
    from scipy.stats import t

    differences = [scores[seed] - others[seed] for seed in scores if seed in others]
    if len(differences) < 2:
        return None
    mean, count = fmean(differences), len(differences)
    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def markdown(tables: dict[str, list[Row]]) -> str:
    """Every table, with what is missing said above it."""
    parts = []
    for title, rows in tables.items():
        done, asked = sum(len(row.scores) for row in rows), sum(row.num_seeds for row in rows)
        partial = "" if done == asked else f" (partial: {done} of {asked} runs)"
        parts += [
            f"### {title}{partial}", "",
            f"| arm | seeds | score | by seed | minus {rows[0].arm} [95 %] | s |",
            "|---|---|---|---|---|---|",
            *map(_line, rows), "",
        ]  # fmt: skip
    return "\n".join(parts)


def as_json(tables: dict[str, list[Row]]) -> dict[str, Any]:
    return {title: [row._asdict() for row in rows] for title, rows in tables.items()}


def _line(row: Row) -> str:
    spread = f" +- {stdev(row.scores.values()):.3f}" if len(row.scores) > 1 else ""
    mean = "-" if row.mean is None else f"{row.mean:.3f}{spread}"
    by_seed = " ".join(f"{score:.3f}" for _, score in sorted(row.scores.items()))
    difference = "" if row.paired is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.paired)
    seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
    return f"| {row.arm} | {len(row.scores)} | {mean} | {by_seed} | {difference} | {seconds} |"
