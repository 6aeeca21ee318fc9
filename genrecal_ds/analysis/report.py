"""A run's report: report.json, a table in the terminal, one HTML page without external loads."""

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genrecal_ds.analysis.page import data_address
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader

NUM_EXAMPLES = 24
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
# One chart each: title, stages of the run, metrics
CHARTS = (
    ("Align: CE through the teacher's head", ("align",), ("ar_boundary", "ar_other",
     "regular_ar_boundary", "regular_ar_other")),
    ("Align: KL to the teacher", ("align",), ("kl_boundary", "kl_other", "regular_kl_boundary",
     "regular_kl_other")),
    ("Distill: CE through the teacher's head", ("distill",), ("ar_boundary", "ar_other")),
    ("Distill: KL to the teacher", ("distill",), ("kl_boundary", "kl_other")),
    ("Student's own CE", ("distill", "sft"), ("student_ce_boundary", "student_ce_other",
     "validation/student_ce")),
    ("Gradient norm at the student's hidden states", ("distill",), ("gradient/ar_boundary",
     "gradient/ar_other", "gradient/kl_boundary", "gradient/kl_other", "gradient/student_ce")),
)  # fmt: skip


def write_report(
    run: Path, teacher: dict[str, Any], students: dict[str, dict], seconds: dict[str, float],
    tables: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write run/report.json and run/report.html from scores, run/probes.json and the logs.

    With what is there of: figures, in run/figures, and tables of genrecal_ds.ablate.
    """
    probes = run / "probes.json"
    packages = ("torch", "deepspeed", "transformers", "webdataset")
    report = {
        "teacher": teacher,
        "students": students,
        "probes": json.loads(probes.read_text()) if probes.is_file() else {},
        "seconds": seconds,
        "versions": {name: version(name) for name in packages},
        "tables": [json.loads(path.read_text()) for path in tables if path.is_file()],
    }
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    curves = {stage: read_log(run / "genrecal" / stage) for stage in ("align", "distill", "sft")}
    answers = read_answers(run / "scores", ["teacher", *students], "heldout")
    pictures = _pictures(run / "data/heldout", answers)
    figures = [data_address(path) for path in sorted((run / "figures").glob("*.png"))]
    (run / "report.html").write_text(render(report, curves, answers, pictures, figures))
    return report


def read_log(stage: Path) -> list[dict[str, Any]]:
    """The records of a stage's metrics.jsonl."""
    path = stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def read_answers(folder: Path, models: Sequence[str], shards: str) -> list[dict[str, Any]]:
    """One record per sample: question, gold, and every model's prediction; errors first."""
    lines = {
        model: [
            json.loads(line)
            for line in (folder / f"{model}.{shards}.predictions.jsonl").read_text().splitlines()
        ]
        for model in models
    }
    merged = []
    for number, first in enumerate(lines[models[0]]):
        by_model = {model: lines[model][number] for model in models}
        merged.append({
            "number": number, "kind": first["kind"], "question": first["question"],
            "gold": first["gold"],
            "predictions": {m: (r["prediction"], r["score"] == 1) for m, r in by_model.items()},
        })  # fmt: skip
    last = models[-1]
    return sorted(merged, key=lambda record: record["predictions"][last][1])


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Scores by model (rows) and kind of question (columns), with the overall interval."""
    kinds = [kind for kind in report["teacher"] if kind != "overall"]
    table = Table(title="held-out handwriting: accuracy [95 % interval]")
    for column in ("model", "overall", *kinds):
        table.add_column(column, no_wrap=True)
    for name, scores in _models(report):
        table.add_row(name, _cell(scores["overall"], True), *(_cell(scores[k]) for k in kinds))
    # A log file has no width of its own, and a narrow one would cut the numbers off.
    console = console or Console()
    console.print(table) if console.width >= 110 else Console(width=110).print(table)


def markdown_table(report: dict[str, Any]) -> str:
    """The same table for README.md."""
    kinds = [kind for kind in report["teacher"] if kind != "overall"]
    lines = ["| model | overall [95 % interval] | " + " | ".join(kinds) + " |"]
    lines.append("|---" * (len(kinds) + 2) + "|")
    for name, scores in _models(report):
        cells = [name, _cell(scores["overall"], True), *(_cell(scores[k]) for k in kinds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _models(report: dict[str, Any]) -> list[tuple[str, dict]]:
    return [("teacher", report["teacher"]), *report["students"].items()]


def _cell(score: dict[str, Any], with_interval: bool = False) -> str:
    text = f"{score['score']:.3f}"
    return f"{text} [{score['low']:.3f}, {score['high']:.3f}]" if with_interval else text


def render(
    report: dict[str, Any], curves: dict[str, list[dict]], answers: list[dict[str, Any]],
    pictures: dict[int, list[str]], figures: Sequence[str] = (),
) -> str:  # fmt: skip
    """The page. Every text from data or models is escaped; pictures are data: addresses."""
    charts = [
        line_chart(title, _series(curves, stages, metrics)) for title, stages, metrics in CHARTS
    ]
    seconds = "".join(
        f"<tr><td>{html.escape(name)}<td>{value:.0f}" for name, value in report["seconds"].items()
    )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return _PAGE.format(
        scores=_score_table(report),
        charts="".join(chart for chart in charts if chart),
        probes=_probe_tables(report["probes"]),
        tables="".join(map(_arms_tables, report.get("tables", []))),
        figures="".join(f'<p><img src="{address}" alt="">' for address in figures),
        examples="".join(_example(record, pictures) for record in answers[:NUM_EXAMPLES]),
        seconds=seconds,
        versions=html.escape(versions),
    )


def _score_table(report: dict[str, Any]) -> str:
    kinds = [kind for kind in report["teacher"] if kind != "overall"]
    head = "".join(f"<th>{html.escape(k)}" for k in ("model", "overall [95 % interval]", *kinds))
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{_cell(scores['overall'], True)}"
        + "".join(f"<td>{_cell(scores[kind])}" for kind in kinds)
        for name, scores in _models(report)
    )
    return f"<table><tr>{head}{rows}</table>"


def _probe_tables(probes: dict[str, Any]) -> str:
    parts = []
    for stage, values in probes.items():
        names = list(values["q_s"]["true"])
        head = "".join(f"<th>{html.escape(name)}" for name in ("q_s", *names))
        rows = "".join(
            f"<tr><td>{html.escape(state)}" + "".join(f"<td>{row[n]:.4f}" for n in names)
            for state, row in values["q_s"].items()
        )
        norms = ", ".join(f"{name} {norm:.4f}" for name, norm in values["gradient_norm"].items())
        cosine = values["cosine"]
        parts.append(
            f"<h3>after {html.escape(stage)}</h3><table><tr>{head}{rows}</table>"
            f"<p>Gradient norm at the student's hidden states: {html.escape(norms)}. "
            f"Cosine of boundary rows, mixed against regular: diagonal "
            f"{cosine['diagonal']:.2f}, off-diagonal {cosine['off_diagonal']:.2f}.</p>"
        )
    return "".join(parts)


def _arms_tables(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Those of genrecal_ds.ablate, a partial one said to be so."""
    parts = []
    for title, rows in tables.items():
        if "scores" not in rows[0]:  # of probes
            continue
        done, asked = sum(len(row["scores"]) for row in rows), sum(r["num_seeds"] for r in rows)
        partial = "" if done == asked else f" (partial: {done} of {asked} runs)"
        parts.append(f"<h3>{html.escape(title + partial)}</h3><table><tr><th>arm<th>by seed"
                     f"<th>minus {html.escape(rows[0]['arm'])} [95 %]")  # fmt: skip
        for row in rows:
            by_seed = " ".join(f"{score:.3f}" for _, score in sorted(row["scores"].items()))
            paired = row["paired"]
            difference = "" if paired is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired)
            parts.append(f"<tr><td>{html.escape(row['arm'])}<td>{by_seed}<td>{difference}")
        parts.append("</table>")
    return "".join(parts)


def _example(record: dict[str, Any], pictures: dict[int, list[str]]) -> str:
    images = "".join(f'<img src="{src}" alt="">' for src in pictures.get(record["number"], []))
    rows = "".join(
        f'<tr class="{"right" if correct else "wrong"}"><td>{html.escape(model)}'
        f"<td>{html.escape(prediction)}"
        for model, (prediction, correct) in record["predictions"].items()
    )
    return (
        f"<figure>{images}<figcaption><b>{html.escape(record['question'])}</b><br>"
        f"gold: {html.escape(record['gold'])}</figcaption><table>{rows}</table></figure>"
    )


def _pictures(shards: Path, answers: list[dict[str, Any]]) -> dict[int, list[str]]:
    """data: addresses of the pictures of the shown examples."""
    reader = ShardReader(ShardIndex.load(shards))
    found = {}
    for record in answers[:NUM_EXAMPLES]:
        addresses = []
        for image in reader.read(record["number"]).images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            code = base64.b64encode(buffer.getvalue()).decode("ascii")
            addresses.append(f"data:image/png;base64,{code}")
        found[record["number"]] = addresses
    return found


Series = dict[str, list[tuple[int, float]]]


def _series(curves: dict[str, list[dict]], stages: Sequence[str], metrics: Sequence[str]) -> Series:
    """{metric: [(step, value)]}, the stages one after the other."""
    series: Series = {metric: [] for metric in metrics}
    offset = 0
    for stage in stages:
        records = curves.get(stage, [])
        for record in records:
            for metric in metrics:
                if metric in record["metrics"]:
                    series[metric].append((offset + record["step"], record["metrics"][metric]))
        offset += records[-1]["step"] if records else 0
    return {metric: points for metric, points in series.items() if points}


def line_chart(title: str, series: Series, width: int = 520, height: int = 220) -> str:
    """An inline SVG with a legend; empty for no series."""
    if not series:
        return ""
    points = [point for line in series.values() for point in line]
    most_x = max(x for x, _ in points)
    low = min(0.0, min(y for _, y in points))
    high = max(y for _, y in points)
    span = (high - low) or 1.0

    def place(x: int, y: float) -> str:
        return f"{40 + (width - 50) * x / most_x:.1f},{10 + (height - 30) * (high - y) / span:.1f}"

    lines, legend = [], []
    for (name, line), color in zip(series.items(), COLORS, strict=False):
        path = " ".join(place(x, y) for x, y in line)
        lines.append(f'<polyline fill="none" stroke="{color}" points="{path}"/>')
        legend.append(f'<span style="color:{color}">{html.escape(name)}</span>')
    axis = (
        f'<text x="2" y="16">{high:.3g}</text><text x="2" y="{height - 18}">{low:.3g}</text>'
        f'<text x="{width - 40}" y="{height - 4}">{most_x}</text>'
    )
    return (
        f"<figure><figcaption>{html.escape(title)}<br>{' &middot; '.join(legend)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}">{axis}{"".join(lines)}</svg></figure>'
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>genrecal_ds: report</title>
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 1150px; color: #1f2328 }}
table {{ border-collapse: collapse; margin: .5em 0 }}
td, th {{ border: 1px solid #d0d7de; padding: 3px 9px; text-align: left }}
figure {{ display: inline-block; vertical-align: top; margin: 0 1em 1em 0 }}
p img {{ max-width: 100% }}
figure img {{ image-rendering: pixelated; width: 128px }}
svg text {{ font-size: 11px; fill: #57606a }}
.right td {{ color: #1a7f37 }} .wrong td {{ color: #d1242f }}
</style>
<h1>genrecal_ds: report</h1>
<h2>Held-out handwriting</h2>{scores}
<h2>Curves</h2>{charts}
<h2>Where the student's knowledge enters</h2>
<p>The mixed pass with the student's question states q_s as they are, of another sample, and zeroed.
Only boundary rows (the last question row) can tell the difference.</p>{probes}
<h2>Figures</h2>{figures}
<h2>Arms over seeds</h2>{tables}
<h2>Examples, the last model's errors first</h2>{examples}
<h2>Seconds</h2><table>{seconds}</table><p>{versions}</p>
</html>
"""
