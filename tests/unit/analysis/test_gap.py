"""How far a student is from its teacher: none from itself, and far with another's question."""

import json

import pytest

from genrecal_ds.analysis.gap import main

pytestmark = pytest.mark.unit


def test_a_model_is_no_way_from_itself_and_hears_its_question(pair, shards, tmp_path, capsys):
    teacher, student = pair / "teacher_init", pair / "student_init"
    out = tmp_path / "gap.json"
    command = [str(teacher), str(shards / "validation"), str(teacher), str(student)]
    assert main([*command, "--out", str(out), "--samples", "12"]) == 0
    found = json.loads(out.read_text())
    itself, other = found[str(teacher)], found[str(student)]
    for rows in ("boundary", "other"):
        assert 0 <= itself[f"kl_{rows}"] < 1e-5 < itself[f"kl_shuffled_{rows}"]
        assert itself[f"gradient/kl_{rows}"] < 1e-4 < other[f"gradient/kl_{rows}"]
        assert other[f"kl_{rows}"] > 0.1 and other[f"gradient/student_ce_{rows}"] > 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 4 and f"| {student} |" in printed


def test_too_few_samples_and_no_model_are_one_line(pair, shards, tmp_path, capsys):
    command = [str(pair / "teacher_init"), str(shards / "validation"), str(pair / "student_init")]
    assert main([*command, "--out", str(tmp_path / "o"), "--samples", "1"]) == 2
    assert "no two samples of one turn" in capsys.readouterr().err
    command[2] = str(tmp_path)
    assert main([*command, "--out", str(tmp_path / "o")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
