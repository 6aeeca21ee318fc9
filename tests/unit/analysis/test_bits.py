"""Bits per byte and the teacher's KL: a model measured as teacher and as its own student."""

import shutil

import pytest

from genrecal_ds.analysis.bits import bits
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def samples(shards):
    reader = ShardReader(ShardIndex.load(shards / "validation"))
    return [reader.read(number) for number in range(4)]


def test_a_teacher_is_its_own_best_student(pair, samples):
    folder = pair / "teacher_init"
    found = bits(folder, [folder], samples)
    own, teacher = found[str(folder)], found["teacher"]
    assert own["bits_per_byte"] == pytest.approx(teacher["bits_per_byte"], rel=1e-5)
    assert own["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    answers = sum(len(sample.messages[-1]["content"][0]["text"].encode()) for sample in samples)
    assert own["num_bytes"] == answers and len(own["at"]["bits_per_byte"]) == 4


def test_students_are_states_of_one_model(pair, samples, tmp_path):
    student = pair / "student_init"
    again = shutil.copytree(student, tmp_path / "again")
    found = bits(pair / "teacher_init", [student, again], samples)
    assert found[str(student)] == found[str(again)]
    assert found[str(student)]["teacher_kl"] > 0.01
    with pytest.raises(UserError, match="measure it by itself"):
        bits(pair / "teacher_init", [student, pair / "twin_init"], samples)
