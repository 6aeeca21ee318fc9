"""Writes analysis.html: figures and tables on one page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genrecal_ds.console.page import html_page, picture_file

_BODY = """
<p>{{ result.num_samples }} held-out conversations of one turn. Own CE before training: teacher
{{ "%.3f"|format(result.own_ce.teacher) }}, student {{ "%.3f"|format(result.own_ce.student) }}.</p>
{% for title, address in figures %}
<h2>{{ title }}</h2><img src="{{ address }}" alt="{{ title }}">
{% endfor %}
<h2>Cosines of boundary rows</h2>
<table><tr><th>run<th>diagonal<th>off-diagonal</tr>
{% for name, cosine in result.cosines.items() %}
<tr><td>{{ name }}<td>{{ "%.3f"|format(cosine.diagonal) }}
<td>{{ "%.3f"|format(cosine.off_diagonal) }}</tr>
{% endfor %}</table>
<h2>Rows whose nearest neighbour is the other model's</h2>
<table>{% for place, share in result.nearest_is_of_the_other_model.items() %}
<tr><td>{{ place }}<td>{{ "%.2f"|format(share) }}</tr>{% endfor %}</table>
{% if result.calibration is defined %}
<h2>How sure answers are</h2>
<table><tr><th>model<th>ECE<th>confidence when right<th>when wrong<th>n</tr>
{% for name, c in result.calibration.items() %}
<tr><td>{{ name }}<td>{{ "%.3f"|format(c.ece) }}
<td>{{ "-" if c.right is none else "%.3f"|format(c.right) }}
<td>{{ "-" if c.wrong is none else "%.3f"|format(c.wrong) }}<td>{{ c.n }}</tr>
{% endfor %}</table>
<h2>Errors: {{ result.errors.of[0] }}, then {{ result.errors.of[1] }}</h2>
<table>{% for kind, outcomes in result.errors.kinds.items() %}
<tr><td>{{ kind }}<td>{% for outcome, count in outcomes.items() %}{{ outcome }}: {{ count }}
{% endfor %}</tr>{% endfor %}</table>
{% endif %}
"""


def write_page(result: Mapping[str, Any], titles: Mapping[str, str], out: Path) -> None:
    """Write the page. titles: those of the PNG files in out to show, in order."""
    shown = [(title, picture_file(out / name)) for name, title in titles.items()]
    page = html_page(str(result["run"]), _BODY, result=result, figures=shown)
    (out / "analysis.html").write_text(page)
