"""A teacher's right answers become shards: questions and pictures as they were, wrong ones out."""

import json

import pytest

from data_tools.collect_responses import main
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader

pytestmark = pytest.mark.unit


def write_predictions(path, keys, score=lambda number: float(number % 2), text="it is {}\n"):
    lines = [
        {"key": key, "prediction": text.format(number), "score": score(number)}
        for number, key in enumerate(keys)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_right_answers_replace_the_last_turn(tmp_path, shards, capsys):
    folder = shards
    old = ShardReader(ShardIndex.load(folder))
    keys = [old.read(number).key for number in range(len(old))]
    predictions = write_predictions(tmp_path / "p.jsonl", keys[:-1])
    out = tmp_path / "out"
    assert main([str(folder), str(predictions), "--out", str(out), "--shard-size", "8"]) == 0
    printed = capsys.readouterr().out
    kept = [n for n in range(len(keys) - 1) if n % 2]
    assert f"{len(kept)} responses kept" in printed
    assert "no_response: 1" in printed and f"wrong_answer: {len(keys) - 1 - len(kept)}" in printed
    new = ShardReader(ShardIndex.load(out))
    for place, number in enumerate(kept):
        before, after = old.read(number), new.read(place)
        assert after.messages[:-1] == before.messages[:-1]
        assert after.messages[-1]["content"] == [{"type": "text", "text": f"it is {number}"}]
        assert (after.kind, after.answers) == (before.kind, before.answers)
        pictures = [
            [data for name, data in reader.members(n).items() if name != "json"]
            for reader, n in ((old, number), (new, place))
        ]
        assert pictures[0] == pictures[1]
    assert main([str(folder), str(predictions), "--out", str(out), "--shard-size", "8"]) == 0
    other = write_predictions(tmp_path / "q.jsonl", keys, score=lambda number: 1.0)
    assert main([str(folder), str(other), "--out", str(out), "--shard-size", "8"]) == 2


def test_bad_predictions_are_one_line(tmp_path, shards, capsys):
    folder, out = str(shards), str(tmp_path / "out")
    for text, message in (
        ("{}\n", ":1: not a line with key, prediction, score"),
        ('{"key": 1, "prediction": "x", "score": 1}\n', ":1: key or prediction is no text"),
        ('{"key": "a", "prediction": "x", "score": 1}\n' * 2, ":2: key or prediction is no text"),
    ):
        path = tmp_path / "p.jsonl"
        path.write_text(text)
        assert main([folder, str(path), "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert main([folder, str(tmp_path / "none"), "--out", out]) == 2
    nothing = write_predictions(tmp_path / "p.jsonl", ["strange"], score=lambda number: 1.0)
    assert main([folder, str(nothing), "--out", out]) == 2  # no sample would be in it
