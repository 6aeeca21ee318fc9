"""The report: every text from data or models is escaped; all models are in it; the gate."""

import pytest
from rich.console import Console

from genrecal_ds.analysis.report import print_table, render
from genrecal_ds.analysis.report_page import line_chart
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics import scores_by_kind
from launch.demo.run import STUDENTS, require_lead

pytestmark = pytest.mark.unit
HOSTILE = "<script>alert(1)</script>\"'&"


def scores(correct, total=100):
    outcomes = [number < correct for number in range(total)]
    return scores_by_kind(["place"] * total, outcomes)


def report():
    rows = {"ar_boundary": 1.0, "kl_boundary": 2.0, "ar_other": 3.0, "kl_other": 4.0}
    probe = {
        "q_s": {"true": rows, "shuffled": rows, "zeroed": rows},
        "gradient_norm": {"mixed_boundary": 1.0},
        "cosine": {"diagonal": 0.7, "off_diagonal": 0.1, "matrix": []},
    }
    return {
        "teacher": scores(95), "students": {name: scores(50) for name in STUDENTS},
        "probes": {"distill": probe}, "seconds": {HOSTILE: 3.0}, "versions": {"torch": "2.13.0"},
        "tables": [{HOSTILE: [
            {"arm": HOSTILE, "scores": {"1": 0.5, "2": 0.6}, "num_seeds": 2, "paired": None},
            {"arm": "other", "scores": {"1": 0.4}, "num_seeds": 2, "paired": [-0.1, -0.2, 0.0]},
        ]}],
    }  # fmt: skip


def test_page_escapes_and_loads_nothing():
    answers = [{
        "number": 0, "kind": "place", "question": HOSTILE, "gold": HOSTILE,
        "predictions": {"teacher": (HOSTILE, True), HOSTILE: (HOSTILE, False)},
    }]  # fmt: skip
    values = [{"ar_boundary": 2.0, "kl_boundary": 0.1}, {"ar_boundary": 1.0, "kl_boundary": 0.2}]
    curves = {"distill": [{"step": n, "metrics": v} for n, v in enumerate(values, start=1)]}
    page = render(report(), curves, answers, {0: ["data:image/png;base64,AAAA"]},
                  ["data:image/png;base64,BBBB"])  # fmt: skip
    assert "(partial: 3 of 4 runs)" in page and "-0.100 [-0.200, +0.000]" in page
    assert "0.500 0.600" in page and '<img src="data:image/png;base64,BBBB"' in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page
    assert page.count("<polyline") == 2
    for name in STUDENTS:
        assert f"<td>{name}<td>0.500" in page


def test_tables_hold_every_model(capsys):
    print_table(report(), Console(width=120))
    printed = capsys.readouterr().out
    for name in ("teacher", *STUDENTS):
        assert name in printed
    assert "0.950 [0.888, 0.978]" in printed


def test_charts_of_nothing_and_of_constants():
    assert line_chart("x", {}) is None
    chart = line_chart("x", {"loss": [(1, 0.0), (2, 0.0)]})
    assert chart is not None and "nan" not in chart["lines"][0]["points"]


def test_gate_wants_a_lead_and_disjoint_intervals():
    require_lead(scores(95), scores(60))
    with pytest.raises(UserError, match="does not lead"):
        require_lead(scores(70), scores(60))
    with pytest.raises(UserError, match="nothing to distil"):
        require_lead(scores(7, 10), scores(4, 10))  # 30 points, but intervals overlap
