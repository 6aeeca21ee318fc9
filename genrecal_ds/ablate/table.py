"""Makes tables of the arms' scores over seeds, and says which runs are missing."""

import json
import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean, stdev
from typing import Any, NamedTuple

from genrecal_ds.ablate.grid import ALL_ARMS, Grid, Run, heading

MARK = r"\* above every control, each interval without zero"  # bare, it would begin a list

Difference = tuple[float, float, float]  # mean and its 95 % interval
Scores = dict[int, float]  # seed: score


class Row(NamedTuple):
    """One arm of a table. Scores are shares of 1; a difference is of equal seeds."""

    arm: str
    scores: Scores
    num_seeds: int  # asked for
    paired: Difference | None  # to the table's first arm
    seconds: float | None  # of training, on average
    condition: str | None
    measure: str | None  # None: the score over all questions
    minus: dict[str, Difference | None]  # to every control of the grid, if it has any

    @property
    def mean(self) -> float | None:
        return fmean(self.scores.values()) if self.scores else None

    @property
    def is_above(self) -> bool:
        """Whether every control's interval lies above zero; a control is never above itself."""
        intervals = self.minus.values()
        return bool(intervals) and all(minus is not None and minus[1] > 0 for minus in intervals)


def tables_of(grid: Grid, runs: Sequence[Run]) -> dict[str, list[Row]]:
    """{heading: rows}, from the score files that are there: by title, condition and measure."""
    done = [(run, json.loads(run.score.read_text())["scores"]) for run in runs if run.is_done]
    titles = grid.tables or {ALL_ARMS: tuple(grid.arms)}
    tables = {}
    for title, condition, measure in product(titles, grid.contexts, (None, *grid.measures)):
        scores: dict[str, Scores] = {arm: {} for arm in grid.arms}
        seconds: dict[str, list[float]] = {arm: [] for arm in grid.arms}
        for run, by_kind in done:
            if run.condition == condition:
                kinds = None if measure is None else grid.measures[measure]
                scores[run.arm][run.seed] = mean_of(by_kind, kinds)
                seconds[run.arm].append(json.loads((run.folder / "seconds.json").read_text()))
        first = titles[title][0]
        tables[heading(title, condition, measure)] = [
            Row(
                arm,
                scores[arm],
                len(grid.seeds),
                difference(arm, first, scores),
                fmean(seconds[arm]) if seconds[arm] else None,
                condition,
                measure,
                {control: difference(arm, control, scores) for control in grid.controls},
            )
            for arm in titles[title]
        ]
    return tables


def mean_of(scores: dict[str, dict[str, Any]], kinds: Sequence[str] | None) -> float:
    """The mean over the questions of these kinds (None: all kinds), from a score file's entries."""
    if kinds is None:
        return scores["overall"]["score"]
    total = sum(scores[kind]["n"] for kind in kinds)
    return sum(scores[kind]["score"] * scores[kind]["n"] for kind in kinds) / total


def difference(arm: str, other: str, scores: dict[str, Scores]) -> Difference | None:
    return None if arm == other else paired(scores[arm], scores[other])


def paired(scores: Scores, others: Scores) -> Difference | None:
    """(mean difference, low, high): Student's t over the seeds that both have, 2 at least."""
    from scipy.stats import t

    differences = [scores[seed] - others[seed] for seed in scores if seed in others]
    if len(differences) < 2:
        return None
    mean, count = fmean(differences), len(differences)
    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def markdown(tables: dict[str, list[Row]]) -> str:
    """Every table as Markdown; a line above it says what is missing."""
    parts = []
    for title, rows in tables.items():
        done, asked = sum(len(row.scores) for row in rows), sum(row.num_seeds for row in rows)
        partial = "" if done == asked else f" (partial: {done} of {asked} runs)"
        others = [f"minus {arm} [95 %]" for arm in rows[0].minus or [rows[0].arm]]
        columns = ["arm", "seeds", "score", "by seed", *others, "s"]
        parts += [
            f"### {title}{partial}", "",
            f"| {' | '.join(columns)} |", "|" + "---|" * len(columns),
            *map(_line, rows), "",
        ]  # fmt: skip
        if any(row.is_above for row in rows):
            parts += [MARK, ""]
    return "\n".join(parts)


def as_json(tables: dict[str, list[Row]]) -> dict[str, Any]:
    return {
        title: [row._asdict() | {"is_above": row.is_above} for row in rows]
        for title, rows in tables.items()
    }


def _line(row: Row) -> str:
    spread = f" +- {stdev(row.scores.values()):.3f}" if len(row.scores) > 1 else ""
    mark = " *" if row.is_above else ""
    mean = "-" if row.mean is None else f"{row.mean:.3f}{spread}{mark}"
    by_seed = " ".join(f"{score:.3f}" for _, score in sorted(row.scores.items()))
    minus = [
        "" if interval is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)
        for interval in (row.minus.values() if row.minus else [row.paired])
    ]
    seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
    cells = [row.arm, str(len(row.scores)), mean, by_seed, *minus, seconds]
    return f"| {' | '.join(cells)} |"
