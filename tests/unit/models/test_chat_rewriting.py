"""A template that rewrites earlier turns: every turn is taught in a sequence of its own."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from genrecal_ds.data.features import FeatureStore, FeatureWriter
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import CachedPairEncoders, PairDataset, PairEncoders
from genrecal_ds.models.chat import ChatEncoder
from genrecal_ds.training.teacher_cache import keep
from tests.unit.models.test_chat import ANSWERS, conversation
from tests.unit.models.test_vlm_every_family import chat
from tests.zoo.tokenizers import BOT, END

pytestmark = pytest.mark.unit
PICTURES = [Image.new("RGB", (32, 32), (10, 200, 90)), Image.new("RGB", (64, 32), (9, 9, 9))]
HEADER = "no thought.\n"


@pytest.fixture(scope="module")
def thinker(zoo, tmp_path_factory):
    """The folder of a model that writes words before its last answer alone, as Qwen3's does."""
    folder = tmp_path_factory.mktemp("rewriting") / "model"
    shutil.copytree(zoo("qwen2_vl"), folder)
    path = folder / "chat_template.jinja"
    header = f"{BOT}{{% if loop.last %}}{HEADER}{{% endif %}}{{% generation %}}"
    path.write_text(path.read_text().replace(f"{BOT}{{% generation %}}", header))
    return folder


def pairs_of(thinker, other, max_length=1000, too_long="drop", is_teacher=True):
    one, two = ChatEncoder(thinker, max_length), ChatEncoder(other, max_length)
    return PairEncoders(*((two, one) if is_teacher else (one, two)), too_long)


MESSAGES = chat((1, "x ?", "it is 7"), (0, "y ?", "12"), (1, "z ?", "3 plus 8 is 11"))


@pytest.mark.parametrize("is_teacher", [True, False])
def test_each_turn_stands_behind_its_history_on_both_sides(zoo, thinker, is_teacher):
    encoders = pairs_of(thinker, zoo("internvl"), is_teacher=is_teacher)
    pairs = encoders.encode(MESSAGES, PICTURES)
    assert len(pairs) == 3
    for number, pair in enumerate(pairs, 1):
        history, images = MESSAGES[: 2 * number - 1], PICTURES[: 1 + (number == 3)]
        answer = MESSAGES[2 * number - 1]["content"][0]["text"]
        for encoder, view in zip(encoders.by_side.values(), pair.sides, strict=True):
            ((start, end),) = view.answers
            ids = view.input_ids_T
            # What generation is asked with, to the token, and then the answer.
            assert ids[:start].tolist() == encoder.prompt(history, images)["input_ids"][0].tolist()
            assert encoder.tokenizer.decode(ids[start:end]).strip() == answer + END
            assert view.questions == ((0, start),)
            first = encoder.num_visual(encoder.encode(MESSAGES[:2], PICTURES[:1]))
            assert (encoder.num_visual(view) > first) == (number == 3) and first > 0
        rewriting = encoders.teacher if is_teacher else encoders.student
        text = rewriting.tokenizer.decode(pair.sides[0 if is_teacher else 1].input_ids_T)
        assert text.count(HEADER.strip()) == 1  # before the last answer alone


def test_what_does_not_fit_is_left_out_from_the_end(zoo, thinker):
    whole = pairs_of(thinker, zoo("internvl")).encode(MESSAGES, PICTURES)
    longest = max(len(view.input_ids_T) for view in whole[1].sides)
    pairs = pairs_of(thinker, zoo("internvl"), longest).encode(MESSAGES, PICTURES)
    assert len(pairs) == 2 and pairs[1].is_truncated and not pairs[0].is_truncated
    for pair, known in zip(pairs, whole, strict=False):
        assert torch.equal(pair.student.input_ids_T, known.student.input_ids_T)


def test_one_turn_is_one_pair(zoo, thinker):
    (pair,) = pairs_of(thinker, zoo("internvl")).encode(MESSAGES[:2], PICTURES[:1])
    assert len(pair.student.answers) == 1


@pytest.fixture(scope="module")
def dataset(pair, shards, tmp_path_factory):
    """The demo's pair and data, the teacher's template rewriting its turns."""
    folder = tmp_path_factory.mktemp("loader") / "teacher"
    shutil.copytree(pair / "teacher_init", folder)
    path = folder / "chat_template.jinja"
    old = path.read_text()
    new = old.replace("{% generation %}", "{% if loop.last %}no {% endif %}{% generation %}")
    assert new != old
    path.write_text(new)
    encoders = pairs_of(folder, pair / "student_init")
    assert encoders.teacher.rewrites(conversation(ANSWERS[:2]))
    return PairDataset(ShardIndex.load(shards / "train"), encoders, with_regular=True)


def test_samples_are_counted_as_samples_and_turns_as_turns(dataset):
    slots = tuple(range(12))
    batch = dataset[slots]
    assert batch.num_samples == 12 and batch.used_ids == slots
    assert max(batch.turns_of) == 2 and min(batch.turns_of) == 1
    # One sequence a turn (a placeholder is not needed: there are pictures).
    assert len(batch.student.inputs.input_ids) == sum(batch.turns_of)
    assert int(batch.student.boundary_M.sum()) == sum(batch.turns_of)


def test_the_teachers_rows_are_cached_by_turn_for_a_student_that_needs_one_sequence(
    dataset, tmp_path
):
    slots = tuple(range(12))
    batch = dataset[slots]
    identity = {"of": "a test"}
    writer = FeatureWriter(tmp_path, identity, 0)
    rows_AH = torch.randn(len(batch.teacher.rows_A), 4)
    targets_NH = torch.randn(len(batch.teacher.targets_N), 4)
    keep(writer, batch, rows_AH, targets_NH)
    writer.flush()
    cached = CachedPairEncoders(
        dataset.encoders.student, dataset.encoders.teacher,
        features=FeatureStore(tmp_path, identity), empty_row_1H=torch.zeros(1, 4),
    )  # fmt: skip
    read = PairDataset(dataset.reader.index, cached, with_regular=False)[slots]
    assert read.turns_of == batch.turns_of
    assert torch.equal(read.teacher.labels_N, batch.teacher.labels_N)
    inputs = read.teacher.inputs
    flat = torch.zeros(inputs.input_ids.numel(), 4)
    flat[inputs.real_P] = inputs.vision["rows"]
    assert torch.equal(flat[read.teacher.rows_A], rows_AH[: len(targets_NH)])
    # The student's template rewrites nothing: its turns share a sequence.
    assert len(read.student.inputs.input_ids) < len(batch.student.inputs.input_ids)
    assert np.array_equal(
        read.student.labels_M[read.student.labels_M >= 0],
        batch.student.labels_M[batch.student.labels_M >= 0],
    )


@pytest.mark.parametrize("rewrites", [False, True])
def test_an_untaught_answer_is_part_of_the_next_question_on_both_sides(zoo, thinker, rewrites):
    messages = [dict(message) for message in MESSAGES]
    messages[1]["taught"] = False
    one = thinker if rewrites else zoo("qwen2_vl")
    encoders = pairs_of(one, zoo("internvl"))
    pairs = encoders.encode(messages, PICTURES)
    assert len(pairs) == (2 if rewrites else 1)
    for pair in pairs:
        for encoder, view in zip(encoders.by_side.values(), pair.sides, strict=True):
            taught = [
                encoder.tokenizer.decode(view.input_ids_T[start:end]).strip()
                for start, end in view.answers
            ]
            assert len(taught) == (1 if rewrites else 2)
            assert "it is 7" + END not in taught
            assert "it is 7" in encoder.tokenizer.decode(view.input_ids_T[: view.answers[0][0]])
            if not rewrites:
                whole = encoder.encode(MESSAGES, PICTURES)
                assert view.input_ids_T.tolist() == whole.input_ids_T.tolist(), "the same text"
    ends = [pair.student.answers[-1][1] for pair in pairs]
    assert ends == sorted(ends)
