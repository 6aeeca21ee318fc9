"""The demo's scenes: disjoint handwriting, the same bytes again, answers that are right."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from data_tools.build import main
from data_tools.sources import digits
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit
SPLITS = ("train", "validation", "heldout")


def samples(split, num_samples, seed, kinds=digits.DEFAULT_KINDS, wrong_share=0.0):
    return digits.Digits(split, num_samples, seed, kinds, wrong_share).rows(0, num_samples)


def text(message):
    return message["content"][-1]["text"]


def test_no_handwriting_is_in_two_splits():
    sources = [set(digits.load_split(split)[2].tolist()) for split in SPLITS]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 1797
    used = [
        {int(part) for sample in samples(split, 50, 0) if sample.images
         for part in sample.source_id.split("-")[1:]}
        for split in SPLITS
    ]  # fmt: skip
    assert all(part <= whole for part, whole in zip(used, sources, strict=True))


def test_same_arguments_same_bytes_and_other_seed_others():
    first = list(samples("train", 60, 3))
    assert first == list(samples("train", 60, 3))
    assert first != list(samples("train", 60, 4))
    assert first[:20] == list(samples("train", 20, 3))


def test_only_train_has_text_only_and_two_turns():
    train = list(samples("train", 400, 0))
    assert {len(sample.images) for sample in train} == {0, 1}
    assert {len(sample.messages) for sample in train} == {2, 4}
    for split in ("validation", "heldout"):
        held = list(samples(split, 100, 0))
        assert all(len(s.images) == 1 and len(s.messages) == 2 for s in held)
        assert {s.kind for s in held} == set(digits.DEFAULT_KINDS)


def test_answers_follow_from_the_labels():
    labels = dict(zip(*(digits.load_split("heldout")[i].tolist() for i in (2, 1)), strict=True))
    for sample in samples("heldout", 200, 1, digits.KINDS):
        grid = np.array([labels[int(part)] for part in sample.source_id.split("-")[1:]])
        question, answer, (gold,) = (
            text(sample.messages[0]),
            text(sample.messages[1]),
            sample.answers,
        )
        assert answer.split()[-1] == gold.split()[-1]
        row = slice(0, 2) if "top" in question else slice(2, 4)
        column = slice(0, 4, 2) if "left" in question else slice(1, 4, 2)
        if sample.kind == "digit":
            assert gold == str(grid[0])
        elif sample.kind == "row_sum":
            assert answer == "{} plus {} is {}".format(*grid[row], grid[row].sum())
        elif sample.kind == "column_sum":
            assert answer == "{} plus {} is {}".format(*grid[column], grid[column].sum())
        elif sample.kind == "read":
            assert gold == "".join(map(str, grid[row]))
        elif sample.kind == "largest":
            assert gold == str(grid.max())
        elif sample.kind == "place":
            assert gold == str(
                grid.reshape(2, 2)[int("bottom" in question), int("right" in question)]
            )
        else:
            x0, y0, x1, y1 = map(int, gold.split())
            wanted = question.split()[-2]
            assert str(grid.reshape(2, 2)[y0 // digits.CELL, x0 // digits.CELL]) == wanted
            assert (x1 - x0, y1 - y0) == (digits.CELL, digits.CELL)


def test_scenes_are_pictures_of_their_grid():
    sizes = {}
    for sample in samples("validation", 40, 0, ("digit", "place")):
        image = Image.open(io.BytesIO(sample.images[0][1]))
        sizes.setdefault(sample.kind, set()).add(image.size)
        assert image.mode == "RGB" and np.asarray(image).std() > 20
    assert sizes == {"digit": {(16, 16)}, "place": {(32, 32)}}


def questions(sample):
    return [text(message) for message in sample.messages[::2]]


def finals(sample):
    """Of every answer as taught; of a number of a row all digits, of a box all four numbers."""
    texts = [text(message) for message in sample.messages[1::2]]
    return [words if sample.kind == "box" else words.split()[-1] for words in texts]


def test_without_wrong_answers_samples_are_what_they_were():
    source = digits.Digits("train", 200, 2)
    assert source.digest.startswith("cebb7269a48bec4b")
    rows = [(s.messages, s.kind, s.answers, s.source_id) for s in source.rows(0, 200)]
    assert hashlib.sha256(repr(rows).encode()).hexdigest().startswith("65539edbe62fece3")
    named = digits.open_source("digits", num_samples=200, seed=2, wrong_share=0.0)
    assert named.digest == source.digest and list(named.rows(0, 200)) == list(source.rows(0, 200))
    assert digits.Digits("train", 200, 2, wrong_share=0.1).digest != source.digest


@pytest.mark.parametrize("kinds", [digits.DEFAULT_KINDS, ("digit",), ("box",)])
def test_wrong_answers_change_nothing_but_what_is_taught(kinds):
    pairs = list(
        zip(samples("train", 2000, 0, kinds), samples("train", 2000, 0, kinds, 0.35), strict=True)
    )
    num_turns = num_wrong = 0
    wrong_kinds = set()
    for clean, noisy in pairs:
        assert (noisy.images, noisy.kind, noisy.answers, noisy.source_id, questions(noisy)) == (
            clean.images, clean.kind, clean.answers, clean.source_id, questions(clean)
        )  # fmt: skip
        for turn in range(len(questions(clean))):
            ours, theirs = (text(s.messages[2 * turn + 1]) for s in (noisy, clean))
            num_turns += 1
            if ours != theirs:  # then the final answer differs, not only the reasoning
                assert finals(noisy)[turn] != finals(clean)[turn]
                num_wrong += 1
                wrong_kinds.add(clean.kind)
    assert abs(num_wrong / num_turns - 0.35) < 0.03
    assert wrong_kinds == {*kinds, "sum_text"}
    assert pairs[:50] == list(
        zip(samples("train", 50, 0, kinds), samples("train", 50, 0, kinds, 0.35), strict=True)
    )


def test_a_wrong_answer_agrees_with_itself():
    for sample in samples("train", 400, 0, ("row_sum", "largest"), 0.9):
        for message in sample.messages[1::2]:
            words = text(message).split()
            if "plus" in words:
                assert int(words[0]) + int(words[2]) == int(words[-1])
            else:
                assert max(words[1:5]) == words[-1]


def test_shares_that_cannot_be_are_refused():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=f"--wrong-share {share}: write a share from 0"):
            digits.Digits("train", 1, 0, wrong_share=share)
    for split in ("validation", "heldout"):
        with pytest.raises(UserError, match=f"--wrong-share: --split {split} is for scoring"):
            digits.open_source("digits", split=split, wrong_share=0.1)


def test_the_share_is_an_option_of_the_build(tmp_path, capsys):
    command = ["digits", "--format", "digits", "--num-samples", "60", "--wrong-share"]
    assert main([*command, "0.5", "--out", str(tmp_path / "wrong")]) == 0
    assert ShardIndex.load(tmp_path / "wrong").build["wrong_share"] == 0.5
    assert main([*command, "1", "--out", str(tmp_path / "all")]) == 2
    assert "--wrong-share 1.0: write a share" in capsys.readouterr().err


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="--split test"):
        next(samples("test", 1, 0))
    with pytest.raises(UserError, match="--kinds count"):
        next(samples("train", 1, 0, ("count",)))
