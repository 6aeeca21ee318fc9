"""Scores with golden cases, and batched generation against one prompt at a time."""

import dataclasses
import json

import pytest
import torch

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.__main__ import main
from genrecal_ds.evaluate.generate import Generator
from genrecal_ds.evaluate.metrics import box_iou, exact_match, is_correct, scores_by_kind, wilson
from genrecal_ds.export import export

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "prediction, answers, correct",
    [
        ("7", ["7"], True),
        ("3 plus 8 is 11", ["11"], True),
        ("it is Seven.", ["seven"], True),
        ("11 is the sum", ["11"], False),
        ("17", ["7"], False),
        ("", ["7"], False),
        ("3.5", ["3.5"], True),
        ("bottom left", ["top left"], False),
        ("it is at the top left", ["top left"], True),
        ("left", ["top left"], False),
        ("-3", ["3"], False),
        ("8 minus 11 is -3.", ["-3"], True),
        ("3-4", ["4"], True),  # a range or a score, not minus four
        ("1,234", ["234"], False),
        ("1,234", ["1234"], True),
        ("it can't", ["don't"], False),
        ("it don\u2019t", ["don't"], True),
        ("caf\u00e9", ["cafe"], False),
        ("\u5317\u4eac", ["\u5317\u4eac"], True),
        ("\u5317\u4eac", ["\u4e0a\u6d77"], False),
        ("7", ["."], False),
    ],
)
def test_exact_match_of_the_last_word(prediction, answers, correct):
    assert exact_match(prediction, answers) is correct


def test_boxes_by_intersection_over_union():
    assert box_iou("0 0 10 10", ["0 0 10 10"]) == 1.0
    assert box_iou("0 0 10 10", ["0 0 10 20"]) == 0.5
    assert box_iou("0 0 10 10", ["20 20 30 30"]) == 0.0
    assert box_iou("10 10", ["0 0 10 10"]) == 0.0
    assert box_iou("5 5 5 5", ["5 5 5 5"]) == 0.0  # no area, no division by zero
    assert is_correct("box", "0 0 10 10", ["0 0 10 20"])
    assert not is_correct("box", "0 0 10 9", ["0 0 10 20"])


@pytest.mark.parametrize("answers", [["1 2"], ["0 0 9 9", "none"]])
def test_a_gold_box_that_is_none_is_refused(answers):
    with pytest.raises(UserError, match="four numbers"):
        box_iou("0 0 10 10", answers)


def test_wilson_interval_equals_published_values():
    low, high = wilson(81, 263)  # Newcombe 1998, table I: .2553, .3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(20, 20)
    assert 0.8 < low < 0.85 and high == pytest.approx(1.0)


def test_scores_are_split_by_kind():
    scores = scores_by_kind(["a", "b", "a", "a"], [True, False, True, False])
    assert scores["overall"]["score"] == 0.5 and scores["overall"]["n"] == 4
    assert scores["a"]["score"] == pytest.approx(2 / 3) and scores["b"]["n"] == 1


@pytest.mark.parametrize("model", ["teacher_init", "student_init"])
def test_batched_generation_equals_single(pair, shards, model):
    """Prompts of unequal length, with and without pictures."""
    index = ShardIndex.load(shards / "train")
    reader = ShardReader(index)
    text_only = [i for i, n in enumerate(index.records["num_images"]) if n == 0][:2]
    samples = [reader.read(i) for i in [0, 1, 2, 3, *text_only]]
    torch.manual_seed(0)
    generator = Generator(pair / model, max_new_tokens=8)
    together = next(generator.answers(samples, 6))
    alone = [texts[0] for texts in generator.answers(samples, 1)]
    assert together == alone and len(set(together)) > 1


def test_command_writes_scores_and_predictions(pair, shards, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = [str(pair / "student_init"), str(shards / "validation"), "--out", str(out)]
    assert main([*arguments, "--limit", "5", "--max-new-tokens", "4"]) == 0
    result = json.loads(out.read_text())
    assert result["scores"]["overall"]["n"] == 5 and len(result["model_sha256"]) == 64
    lines = out.with_suffix(".predictions.jsonl").read_text().splitlines()
    assert len(lines) == 5 and {"question", "gold", "prediction"} <= json.loads(lines[0]).keys()
    assert main(["nowhere", *arguments[1:]]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert result["prompt"]["chat_template_sha256"] and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(SystemExit):
        main([*arguments, "--limit", "0"])
    assert "--limit 0" in capsys.readouterr().err


def test_samples_without_answers_are_refused_before_generation(
    pair, shards, tmp_path, capsys, monkeypatch
):
    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda *a: dataclasses.replace(read(*a), answers=[]))
    arguments = [str(pair / "student_init"), str(shards / "validation")]
    assert main([*arguments, "--out", str(tmp_path / "result.json")]) == 2
    assert "no answers" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_export_refuses_what_is_no_result(tmp_path):
    with pytest.raises(UserError, match="neither a finished stage"):
        export(tmp_path, tmp_path / "out")
