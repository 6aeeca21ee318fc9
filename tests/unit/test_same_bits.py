"""tests/same_bits.py tells a difference from none; training is left to the command itself."""

import json

import pytest

from tests.same_bits import compared, files_of, numbers, weights

pytestmark = pytest.mark.unit


def write_run(run, loss, seconds, weight):
    stage = run / "align"
    (stage / "student").mkdir(parents=True)
    (stage / "student/model.safetensors").write_bytes(weight)
    line = {"step": 1, "metrics": {"loss": loss}, "seconds": seconds, "phases": {"data": seconds}}
    (stage / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run


def test_times_may_differ_and_nothing_else(tmp_path):
    base = write_run(tmp_path / "a", 1.5, 0.1, b"x")
    same = write_run(tmp_path / "b", 1.5, 0.2, b"x")
    other = write_run(tmp_path / "c", 1.5 + 2**-50, 0.1, b"y")
    assert numbers(base) == {"align step 1 step": 1, "align step 1 metrics.loss": 1.5}
    assert compared("numbers", numbers(base), numbers(same))
    assert compared("weights", weights(base), weights(same))
    assert not compared("numbers", numbers(base), numbers(other))
    assert not compared("weights", weights(base), weights(other))


def test_what_is_no_longer_logged_is_a_difference(tmp_path):
    there = {"loss": 1.5, "kl": 0.5}
    assert not compared("numbers", {"loss": 1.5}, there)
    assert compared("numbers", there | {"new": 1.0}, there)


def test_nothing_to_compare_is_no_success(tmp_path):
    assert not compared("weights", weights(tmp_path), weights(tmp_path))


def test_a_commit_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="error: git archive nonsense"):
        files_of("nonsense", tmp_path)
