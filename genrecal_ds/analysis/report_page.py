"""Writes report.html: scores, curves, probes, figures, tables of arms and examples."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from genrecal_ds.console.page import html_page

WIDTH, HEIGHT = 520, 220  # of a chart, pixels
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")

_STYLE = """
figure { display: inline-block; vertical-align: top; margin: 0 1em 1em 0 }
figure img { image-rendering: pixelated; width: 128px }
svg text { font-size: 11px; fill: #57606a }
"""
_BODY = """<h2>Held-out handwriting</h2>
<table><tr><th>model<th>overall [95 % interval]
{% for kind in kinds %}<th>{{ kind }}{% endfor %}</tr>
{% for name, cells in scores %}
<tr><td>{{ name }}{% for cell in cells %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}</table>
<h2>Curves</h2>
{% for chart in charts %}
<figure><figcaption>{{ chart.title }}<br>
{% for line in chart.lines %}
<span style="color:{{ line.color }}">{{ line.name }}</span>
{% endfor %}</figcaption>
<svg viewBox="0 0 {{ chart.width }} {{ chart.height }}" width="{{ chart.width }}">
<text x="2" y="16">{{ chart.high }}</text>
<text x="2" y="{{ chart.height - 18 }}">{{ chart.low }}</text>
<text x="{{ chart.width - 40 }}" y="{{ chart.height - 4 }}">{{ chart.last }}</text>
{% for line in chart.lines %}
<polyline fill="none" stroke="{{ line.color }}" points="{{ line.points }}"/>
{% endfor %}</svg></figure>
{% endfor %}
<h2>Where the student's knowledge enters</h2>
<p>The mixed pass with the student's question states q_s as they are, of another sample, and zeroed.
Only boundary rows (the last question row) can tell the difference.</p>
{% for stage, probe in probes.items() %}
<h3>after {{ stage }}</h3>
<table><tr><th>q_s{% for name in probe.q_s.true %}<th>{{ name }}{% endfor %}</tr>
{% for state, row in probe.q_s.items() %}
<tr><td>{{ state }}
{% for name in probe.q_s.true %}<td>{{ "%.4f"|format(row[name]) }}{% endfor %}</tr>
{% endfor %}</table>
<p>Gradient norm at the student's hidden states:
{% for name, norm in probe.gradient_norm.items() %}
{{ name }} {{ "%.4f"|format(norm) }}{{ "." if loop.last else ", " }}
{% endfor %}
Cosine of boundary rows, mixed against regular: diagonal {{ "%.2f"|format(probe.cosine.diagonal) }},
off-diagonal {{ "%.2f"|format(probe.cosine.off_diagonal) }}.</p>
{% endfor %}
<h2>Figures</h2>
{% for address in figures %}<p><img src="{{ address }}" alt=""></p>{% endfor %}
<h2>Arms over seeds</h2>
{% for title, rows in tables %}
<h3>{{ title }}</h3>
<table><tr><th>arm<th>by seed<th>minus {{ rows[0].arm }} [95 %]</tr>
{% for row in rows %}<tr><td>{{ row.arm }}<td>{{ row.by_seed }}<td>{{ row.difference }}</tr>
{% endfor %}</table>
{% endfor %}
<h2>Examples, the last model's errors first</h2>
{% for example in examples %}
<figure>{% for address in example.pictures %}<img src="{{ address }}" alt="">{% endfor %}
<figcaption><b>{{ example.question }}</b><br>gold: {{ example.gold }}</figcaption>
<table>{% for model, (answer, correct) in example.predictions.items() %}
<tr class="{{ "right" if correct else "wrong" }}"><td>{{ model }}<td>{{ answer }}</tr>
{% endfor %}</table></figure>
{% endfor %}
<h2>Seconds</h2>
<table>{% for name, value in seconds.items() %}
<tr><td>{{ name }}<td>{{ "%.0f"|format(value) }}</tr>
{% endfor %}</table>
<p>
{% for name, version in versions.items() %}
{{ name }} {{ version }}{{ "" if loop.last else "," }}
{% endfor %}</p>
"""

Series = dict[str, list[tuple[int, float]]]  # by metric: (step, value)


def report_page(
    report: dict[str, Any],
    scores: Sequence[tuple[str, Sequence[str]]],
    charts: Sequence[dict[str, Any]],
    figures: Sequence[str],
    examples: Sequence[dict[str, Any]],
) -> str:
    """scores: (model, its cells); charts: of line_chart; figures and pictures: data: addresses."""
    kinds = [kind for kind in report["teacher"] if kind != "overall"]
    tables = chain.from_iterable(map(_arms, report["tables"]))
    return html_page(
        "genrecal_ds: report", _BODY, _STYLE, kinds=kinds, scores=scores, charts=charts,
        probes=report["probes"], figures=figures, tables=list(tables), examples=examples,
        seconds=report["seconds"], versions=report["versions"],
    )  # fmt: skip


def line_chart(title: str, series: Series) -> dict[str, Any] | None:
    """Turn series into the points of an SVG; None where there is no series."""
    if not series:
        return None
    points = [point for line in series.values() for point in line]
    last = max(x for x, _ in points)
    low, high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    span = (high - low) or 1.0

    def place(x: int, y: float) -> str:
        return f"{40 + (WIDTH - 50) * x / last:.1f},{10 + (HEIGHT - 30) * (high - y) / span:.1f}"

    lines = [
        {"name": name, "color": color, "points": " ".join(place(x, y) for x, y in line)}
        for (name, line), color in zip(series.items(), COLORS, strict=False)
    ]
    return {
        "title": title, "lines": lines, "width": WIDTH, "height": HEIGHT, "last": last,
        "low": f"{low:.3g}", "high": f"{high:.3g}",
    }  # fmt: skip


def _arms(tables: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Show the tables of genrecal_ds.ablate; a partial table says that it is partial."""
    arms = []
    for title, rows in tables.items():
        if "scores" not in rows[0]:  # of probes
            continue
        done, asked = sum(len(row["scores"]) for row in rows), sum(r["num_seeds"] for r in rows)
        partial = "" if done == asked else f" (partial: {done} of {asked} runs)"
        arms.append((title + partial, [_arm(row) for row in rows]))
    return arms


def _arm(row: dict[str, Any]) -> dict[str, str]:
    paired = row["paired"]
    return {
        "arm": row["arm"],
        "by_seed": " ".join(f"{score:.3f}" for _, score in sorted(row["scores"].items())),
        "difference": "" if paired is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired),
    }
