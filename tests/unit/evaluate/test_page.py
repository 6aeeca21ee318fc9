"""The page of answers: errors first, everything escaped, other shards refused."""

import json
import re
from pathlib import Path

import pytest

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.evaluate.page import main

pytestmark = pytest.mark.unit

HOSTILE = "<script>alert(1)</script>\u202e"


def write(folder: Path, name: str, shards: Path, scores: list[float], answer: str) -> Path:
    reader = ShardReader(ShardIndex.load(shards))
    overall = {"score": sum(scores) / len(scores), "low": 0.0, "high": 1.0, "n": len(scores)}
    out = folder / f"{name}.json"
    out.write_text(json.dumps({"scores": {"overall": overall}, "data": reader.index.fingerprint}))
    with out.with_suffix(".predictions.jsonl").open("w") as file:
        for number, score in enumerate(scores):
            sample = reader.read(number)
            record = {
                "key": sample.key, "kind": sample.kind, "answers": sample.answers,
                "question": f"question {number}", "prediction": answer, "score": score,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return out


def test_errors_come_first_and_nothing_runs(shards, tmp_path):
    folder = shards / "validation"
    first = write(tmp_path, "sft", folder, [1, 1, 0, 0.3], "a")
    second = write(tmp_path, "genrecal", folder, [1, 0, 0, 1], HOSTILE)
    out = tmp_path / "page.html"
    assert main([str(folder), str(first), str(second), "--out", str(out)]) == 0
    text = out.read_text()
    order = [int(number) for number in re.findall(r"question (\d)", text)]
    assert order == [1, 2, 0, 3]  # wrong where the other is right, both wrong, then the rest
    assert "<script" not in text and "&lt;script&gt;" in text and "\u202e" not in text
    assert "default-src 'none'" in text and text.count("data:image/jpeg;base64,") >= 3
    assert text.count('class="wrong"') == 3 and text.count('class="partly"') == 1
    assert main([str(folder), str(first), "--out", str(out), "--most", "1"]) == 0
    assert "1 of 4 samples" in out.read_text()


def test_other_shards_and_missing_files_are_refused(shards, tmp_path, capsys):
    result = write(tmp_path, "sft", shards / "validation", [1.0], "a")
    out = str(tmp_path / "page.html")
    assert main([str(shards / "train"), str(result), "--out", out]) == 2
    assert "other shards" in capsys.readouterr().err
    result.with_suffix(".predictions.jsonl").unlink()
    assert main([str(shards / "validation"), str(result), "--out", out]) == 2
    assert "no such file" in capsys.readouterr().err
