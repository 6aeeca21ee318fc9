"""Numbers of the analysis by hand, what its page escapes, and what it refuses."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from genrecal_ds.analysis.__main__ import main
from genrecal_ds.analysis.calibration import calibration, confidences
from genrecal_ds.analysis.features import mixing
from genrecal_ds.analysis.page import write_page
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.models.chat import ChatEncoder
from tests.fixtures import write_recipe

pytestmark = pytest.mark.unit


def test_calibration_by_hand():
    # bins: .05 alone (wrong), .55 and .57 together (one right), 1.0 in the last bin (right)
    found = calibration([0.05, 0.55, 0.57, 1.0, float("nan")], [0, 1, 0, 1, 0])
    assert found["ece"] == pytest.approx((0.05 + 2 * abs(0.56 - 0.5) + 0) / 4)
    assert found["right"] == pytest.approx((0.55 + 1) / 2)
    assert found["wrong"] == pytest.approx((0.05 + 0.57) / 2)
    assert (found["n"], found["left_out"]) == (4, 1)
    assert calibration([0.5], [1])["wrong"] is None


def test_confidence_is_the_mean_probability_of_the_answers_tokens(pair, shards):
    folder = pair / "student_init"
    reader = ShardReader(ShardIndex.load(shards / "validation"))
    samples = [reader.read(number) for number in range(5)]
    answers = ["7", "3 plus 4", "no", "12", ""]
    found = confidences(folder, samples, answers)
    model, encoder = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64),
        ChatEncoder(folder, 1 << 20),
    )
    for sample, answer, value in zip(samples[:4], answers[:4], found[:4], strict=True):
        last = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        chat = encoder.encode([*sample.messages[:-1], last], sample.images)
        vision = {k: v.double() if v.is_floating_point() else v for k, v in chat.vision.items()}
        with torch.no_grad():
            logits = model(input_ids=chat.input_ids_T[None], **vision).logits[0]
        start, end = chat.answers[-1]
        log_probs = logits[start - 1 : end - 1].log_softmax(-1)
        expected = log_probs.gather(1, chat.input_ids_T[start:end, None]).mean().exp()
        assert value == pytest.approx(float(expected), rel=1e-4)


def test_neighbours_of_the_other_model():
    generator = np.random.default_rng(0)
    one, same = generator.normal(size=(2, 200, 8))
    assert 0.4 < mixing((one, same)) < 0.6
    assert mixing((one, same + 100)) == 0


def test_page_escapes_every_name(tmp_path):
    evil = "<script>alert(1)</script>"
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    result = {
        "run": evil, "num_samples": 1, "own_ce": {"teacher": 1.0, "student": 2.0},
        "cosines": {evil: {"diagonal": 1.0, "off_diagonal": 0.0}},
        "nearest_is_of_the_other_model": {evil: 0.5},
        "calibration": {evil: {"ece": 0.1, "right": None, "wrong": 0.2, "n": 3}},
        "errors": {"of": [evil, evil], "kinds": {evil: {evil: 3}}},
    }  # fmt: skip
    write_page(result, {"a.png": evil}, tmp_path)
    page = (tmp_path / "analysis.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 11
    assert "default-src 'none'" in page


def test_refusals(tmp_path, shards, capsys):
    (tmp_path / "run").mkdir()
    arguments = [str(tmp_path / "run"), str(shards / "validation"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "run: no recipe.yaml; name the folder of a run" in capsys.readouterr().err
    stages = [{"kind": "align", "steps": 1}]
    for name, teacher in (("run", "one"), ("other", "two")):
        (tmp_path / name).mkdir(exist_ok=True)
        tree = {
            "run_dir": name, "teacher": {"path": teacher}, "student": {"path": "s"},
            "data": {"train": "d"}, "batch": {"global_batch": 1, "micro_batch": 1},
            "stages": stages,
        }  # fmt: skip
        write_recipe(tmp_path / name / "recipe.yaml", **tree)
    assert main([*arguments, "--against", str(tmp_path / "other")]) == 2
    assert "its teacher is not one, as in" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "neither align nor distill has ended" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--predictions", "x=y"])
    assert "'x=y' is not NAME=MODEL=FILE" in capsys.readouterr().err
