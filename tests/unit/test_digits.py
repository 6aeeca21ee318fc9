"""The demo's scenes: disjoint handwriting, the same bytes again, answers that are right."""

import io

import numpy as np
import pytest
from PIL import Image

from data_tools.sources import digits
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit
SPLITS = ("train", "validation", "heldout")


def samples(split, num_samples, seed, kinds=digits.DEFAULT_KINDS):
    return digits.Digits(split, num_samples, seed, kinds).rows(0, num_samples)


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


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="--split test"):
        next(samples("test", 1, 0))
    with pytest.raises(UserError, match="--kinds count"):
        next(samples("train", 1, 0, ("count",)))
