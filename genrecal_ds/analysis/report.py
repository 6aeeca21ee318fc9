"""Writes a run's report: report.json, a table in the terminal, one HTML page."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genrecal_ds.analysis.report_page import Series, line_chart, report_page
from genrecal_ds.console.page import picture, picture_file
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader

NUM_EXAMPLES = 24
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

    Figures in run/figures and tables of genrecal_ds.ablate are added where they exist.
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
    figures = [picture_file(path) for path in sorted((run / "figures").glob("*.png"))]
    (run / "report.html").write_text(render(report, curves, answers, pictures, figures))
    return report


def read_log(stage: Path) -> list[dict[str, Any]]:
    """Read the records of a stage's metrics.jsonl."""
    path = stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def read_answers(folder: Path, models: Sequence[str], shards: str) -> list[dict[str, Any]]:
    """Read one record per sample: question, gold, every model's prediction; errors first."""
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
    """Print scores by model (rows) and kind of question (columns), with the overall interval."""
    kinds = [kind for kind in report["teacher"] if kind != "overall"]
    table = Table(title="held-out handwriting: accuracy [95 % interval]")
    for column in ("model", "overall", *kinds):
        table.add_column(column, no_wrap=True)
    for name, scores in _models(report):
        table.add_row(name, _cell(scores["overall"], True), *(_cell(scores[k]) for k in kinds))
    # A log file has no width of its own, and a narrow one would cut the numbers off.
    console = console or Console()
    console.print(table) if console.width >= 110 else Console(width=110).print(table)


def _models(report: dict[str, Any]) -> list[tuple[str, dict]]:
    return [("teacher", report["teacher"]), *report["students"].items()]


def _cell(score: dict[str, Any], with_interval: bool = False) -> str:
    text = f"{score['score']:.3f}"
    return f"{text} [{score['low']:.3f}, {score['high']:.3f}]" if with_interval else text


def render(
    report: dict[str, Any], curves: dict[str, list[dict]], answers: Sequence[dict[str, Any]],
    pictures: dict[int, list[str]], figures: Sequence[str] = (),
) -> str:  # fmt: skip
    """Render the page. pictures: data: addresses by the sample's number."""
    kinds = [kind for kind in report["teacher"] if kind != "overall"]
    scores = [
        (name, [_cell(scores["overall"], True), *(_cell(scores[kind]) for kind in kinds)])
        for name, scores in _models(report)
    ]
    charts = [
        line_chart(title, _series(curves, stages, metrics)) for title, stages, metrics in CHARTS
    ]
    examples = [
        record | {"pictures": pictures.get(record["number"], [])}
        for record in answers[:NUM_EXAMPLES]
    ]
    return report_page(report, scores, [chart for chart in charts if chart], figures, examples)


def _pictures(shards: Path, answers: Sequence[dict[str, Any]]) -> dict[int, list[str]]:
    """Read the pictures of the examples that are shown."""
    reader = ShardReader(ShardIndex.load(shards))
    numbers = [record["number"] for record in answers[:NUM_EXAMPLES]]
    return {number: [picture(image) for image in reader.read(number).images] for number in numbers}


def _series(curves: dict[str, list[dict]], stages: Sequence[str], metrics: Sequence[str]) -> Series:
    """Join the curves of the stages, one after the other."""
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
