"""Makes tables of the runs' last probes, by class of rows: docs/method.md, "Health"."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from genrecal_ds.ablate.grid import PROBES, Grid, Run, heading

# Column: metric. KL to the teacher with the student's question states, another sample's, and none;
# norms of the terms' gradients at the student's hidden states.
COLUMNS = {
    "boundary KL": "kl_boundary",
    "shuffled": "probe/kl_shuffled_boundary",
    "zeroed": "probe/kl_zeroed_boundary",
    "other KL": "kl_other",
    "other shuffled": "probe/kl_shuffled_other",
    "other zeroed": "probe/kl_zeroed_other",
    "gradient kl_boundary": "gradient/kl_boundary",
    "gradient kl_other": "gradient/kl_other",
    "gradient student_ce": "gradient/student_ce",
}


class ProbeRow(NamedTuple):
    """One arm with probes; each number is a mean over the seeds that have the metric."""

    arm: str
    condition: str | None
    num_seeds: int
    means: dict[str, float]  # by metric


def probe_tables(grid: Grid, runs: Sequence[Run]) -> dict[str, list[ProbeRow]]:
    """{heading: rows}, one table per condition; none where no finished run has probes."""
    tables = {}
    for condition in grid.contexts:
        rows = []
        for arm in grid.arms:
            own = [run for run in runs if (run.condition, run.arm) == (condition, arm)]
            measured = [probes for run in own if run.is_done and (probes := last_probes(run))]
            if measured:
                rows.append(ProbeRow(arm, condition, len(measured), _means(measured)))
        if rows:
            tables[heading(PROBES, condition)] = rows
    return tables


def last_probes(run: Run) -> dict[str, float]:
    """The metrics of the last probed step of the last stage with probes; empty if there is none."""
    for stage in reversed(run.facts["stages"]):
        path = run.folder / stage["name"] / "metrics.jsonl"
        for record in reversed(_records(path)):
            if any(name.startswith(("probe/", "gradient/")) for name in record["metrics"]):
                return record["metrics"]
    return {}


def markdown(tables: dict[str, list[ProbeRow]]) -> str:
    columns = ["arm", "seeds", *COLUMNS]
    parts = []
    for title, rows in tables.items():
        parts += [
            f"### {title}", "",
            f"| {' | '.join(columns)} |", "|" + "---|" * len(columns),
            *map(_line, rows), "",
        ]  # fmt: skip
    return "\n".join(parts)


def as_json(tables: dict[str, list[ProbeRow]]) -> dict[str, Any]:
    return {title: [row._asdict() for row in rows] for title, rows in tables.items()}


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    values = {
        name: [probes[name] for probes in measured if name in probes] for name in COLUMNS.values()
    }
    return {name: fmean(numbers) for name, numbers in values.items() if numbers}


def _line(row: ProbeRow) -> str:
    values = [f"{row.means[m]:.3g}" if m in row.means else "-" for m in COLUMNS.values()]
    return f"| {' | '.join([row.arm, str(row.num_seeds), *values])} |"
