"""Scores with golden cases, and batched generation against one prompt at a time."""

import dataclasses
import json
import shutil

import pytest
import torch

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.__main__ import main
from genrecal_ds.evaluate.generate import Generator
from genrecal_ds.evaluate.metrics import metric_of, scores_by_kind
from genrecal_ds.evaluate.metrics.boxes import box_accuracy, box_iou
from genrecal_ds.evaluate.metrics.chart import relaxed_accuracy
from genrecal_ds.evaluate.metrics.document import anls, levenshtein
from genrecal_ds.evaluate.metrics.intervals import bootstrap, score, wilson
from genrecal_ds.evaluate.metrics.letter import letter_of
from genrecal_ds.evaluate.metrics.vqa import normalize, vqa_accuracy
from genrecal_ds.evaluate.metrics.words import exact_match
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
    assert exact_match(prediction, answers) == correct


def test_boxes_by_intersection_over_union():
    assert box_iou("0 0 10 10", ["0 0 10 10"]) == 1.0
    assert box_iou("0 0 10 10", ["0 0 10 20"]) == 0.5
    assert box_iou("0 0 10 10", ["20 20 30 30"]) == 0.0
    assert box_iou("10 10", ["0 0 10 10"]) == 0.0
    assert box_iou("5 5 5 5", ["5 5 5 5"]) == 0.0  # no area, no division by zero
    assert box_accuracy("0 0 10 10", ["0 0 10 20"]) == 1
    assert box_accuracy("0 0 10 9", ["0 0 10 20"]) == 0
    assert box_accuracy("", ["0 0 10 20"]) == box_accuracy("no box", ["0 0 10 20"]) == 0
    # the numbers in brackets, whatever else is counted before them; and others' conventions
    assert box_accuracy("the 2 dogs: [0.1, 0.1, 0.5, 0.5]", ["[0.1, 0.1, 0.5, 0.5]"]) == 1
    assert box_accuracy("(100,100,500,500)", ["[0.1, 0.1, 0.5, 0.5]"], "thousandths") == 1


@pytest.mark.parametrize("answers", [["1 2"], ["0 0 9 9", "none"]])
def test_a_gold_box_that_is_none_is_refused(answers):
    with pytest.raises(UserError, match="four numbers"):
        box_iou("0 0 10 10", answers)


TEN_YES = ["yes"] * 10


@pytest.mark.parametrize(
    "prediction, answers, official, always",
    [
        ("yes", TEN_YES, 1.0, 1.0),
        ("Yes", TEN_YES, 0.0, 1.0),  # ten equal answers: the official code compares as written
        ("yes.", TEN_YES, 0.0, 1.0),
        (" yes\n", TEN_YES, 1.0, 1.0),
        ("Yes", [*TEN_YES[:9], "no"], 1.0, 1.0),
        ("no", [*TEN_YES[:9], "no"], 0.3, 0.3),
        ("no", [*TEN_YES[:8], "no", "no"], 0.6, 0.6),
        ("no", [*TEN_YES[:7], "no", "no", "no"], 0.9, 0.9),
        ("no", [*TEN_YES[:6], *["no"] * 4], 1.0, 1.0),
        ("", TEN_YES, 0.0, 0.0),
        ("two dogs", [*["2 dogs"] * 9, "a dog"], 1.0, 1.0),
        ("dont know", [*["don't know"] * 9, "no"], 1.0, 1.0),
        ("The red-blue one", [*["red blue 1"] * 9, "x"], 1.0, 1.0),
        ("1,000", [*["1000"] * 9, "x"], 1.0, 1.0),
    ],
)
def test_vqa_accuracy(prediction, answers, official, always):
    assert vqa_accuracy(prediction, answers, "official") == pytest.approx(official)
    assert vqa_accuracy(prediction, answers, "always") == pytest.approx(always)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("U.S.A.", "usa"),
        ("3.5 miles", "3.5 miles"),
        ("None", "0"),
        ("It's an Apple!", "it's apple"),
        ("couldn'tve", "couldn't've"),
        ("well", "well"),  # not we'll
        ("left/right", "left right"),
        ("left / right", "left right"),
    ],
)
def test_vqa_normalisation(text, plain):
    assert normalize(text) == plain


@pytest.mark.parametrize(
    "prediction, gold, right",
    [
        ("10.5", "10", True), ("10.51", "10", False), ("-9.5", "-10", True), ("9.5", "-10", False),
        ("50%", "0.5", True), ("50", "50%", False), ("0.0", "0", False), ("0", "0", True),
        ("Yes", "yes", True), ("yes it is", "yes", False), ("", "3", False),
        ("1,200", "1200", False),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction, gold, right):
    assert relaxed_accuracy(prediction, [gold]) == right


def test_anls():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "ab") == 2
    assert anls("Hello  World", ["hello world"]) == 1 - 0 / 12
    assert anls("abcd", ["abxy"]) == 0.5  # exactly one half counts
    assert anls("abcd", ["axyz"]) == 0.0
    assert anls("abcd", ["zzzz", "abcx"]) == 0.75  # the nearest of several
    assert anls("", ["a"]) == 0.0


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("b", "B"), ("(C)", "C"), ("D.", "D"), ("A: a cat", "A"), ("B. two", "B"),
        ("The answer is (C).", "C"), ("answer: d", None), ("I think it is option B", "B"),
        ("The correct choice is D because A is wrong", "D"), ("it must be C.", "C"),
        ("A cat sits there", None), ("", None), ("I am sure", None), ("cab", None),
        ("Answer is A. No, the answer is B", "B"),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert letter_of(text) == letter


def test_kinds_have_their_benchmarks_metric():
    kinds = {
        "vqav2": "vqa", "okvqa": "vqa", "textvqa": "vqa", "refcoco+_testA": "box",
        "chartqa_human": "relaxed", "docvqa": "anls", "ai2d": "letter", "row_sum": "words",
    }  # fmt: skip
    assert {kind: metric_of(kind) for kind in kinds} == kinds


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = [0.0, 0.3, 0.6, 1.0] * 100
    low, high = bootstrap(values)
    spread = 1.96 * (sum((v - 0.475) ** 2 for v in values) / 400) ** 0.5 / 20
    assert low == pytest.approx(0.475 - spread, abs=0.004) and bootstrap(values) == (low, high)
    assert high == pytest.approx(0.475 + spread, abs=0.004)
    assert score([1.0, 0.0])["low"] == wilson(1, 2)[0] and score(values)["low"] == low


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
    assert set(result["metrics"].values()) == {"words"} and not out.with_suffix(".parts").exists()
    assert main([*arguments, "--metric", "bleu"]) == 2
    assert "--metric bleu: there are words, vqa" in capsys.readouterr().err
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


def test_final_answers_and_instructions():
    from genrecal_ds.evaluate.__main__ import final_answer
    from genrecal_ds.evaluate.generate import instructed

    assert final_answer("3 + 4. Answer: 8, no. Answer: 7", "Answer:") == " 7"
    assert final_answer("just 7", "Answer:") == "just 7" == final_answer("just 7", "")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert instructed(turns, "") is turns
    asked = instructed(turns, "Explain.")
    assert [part.get("text") for part in asked[-1]["content"]] == [None, "what?", "\nExplain."]
    assert len(turns[-1]["content"]) == 2


def test_an_export_without_tokenizer_and_an_unknown_metric_are_one_line(
    pair, shards, tmp_path, capsys
):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(pair / "student_init" / name, tmp_path)
    data, out = str(shards / "validation"), ["--out", str(tmp_path / "out.json")]
    assert main([str(tmp_path), data, *out]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "copy tokenizer.json from the model's release" in printed
    assert main([str(pair / "student_init"), data, *out, "--metric", "none"]) == 2
    assert "error: --metric none: there are words, vqa," in capsys.readouterr().err
