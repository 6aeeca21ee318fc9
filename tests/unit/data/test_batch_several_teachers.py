"""Each teacher's part of a micro-batch is what it would be if that teacher were alone."""

import pytest
import torch

from genrecal_ds.data.batch import Alignment, collate, to_device
from genrecal_ds.data.byte_matching import Aligner
from genrecal_ds.data.pair import EncodedChat, Pair, Unusable, encode_pair
from genrecal_ds.training.guards.agreement import calls
from tests.unit.data.test_batch import PAIR, PLACEHOLDER, RULES, STUDENT, TEACHER, chat

pytestmark = pytest.mark.unit

# q1 = 50 51, a1 = 52 3, q2 = 53 54, a2 = 55 56 3    (3 ends a turn)
SECOND = chat([50, 51, 52, 3, 53, 54, 55, 56, 3], [(2, 4), (6, 9)], pixels=2)
TEXT = Pair(
    chat([10, 13, 1], [(1, 3)], 0), chat([20, 22, 2], [(1, 3)], 0),
    more=(chat([50, 51, 52, 55, 3], [(2, 5)], 0),),
)  # fmt: skip
PAIRS = [Pair(TEACHER, STUDENT, more=(SECOND,)), TEXT]
PLACE = Pair(*PLACEHOLDER.sides, is_placeholder=True, more=(chat([50, 52, 3], [(1, 3)]),))
# Answers are "ab" and "cde" in every tokenizer's own pieces; 13, 22 and 52 spell TEXT's "ab" too.
FIRST_PIECES = {13: b"a", 14: b"b", 17: b"cde"}
SECOND_PIECES = {52: b"ab", 55: b"cd", 56: b"e"}
STUDENT_PIECES = {22: b"ab", 26: b"c", 27: b"d", 28: b"e"}


def pieces(spelt):
    return [spelt.get(token) for token in range(60)]


def aligner(spelt):
    return Aligner(pieces(spelt), pieces(STUDENT_PIECES))


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("with_regular", [False, True])
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[1:], []], ids=["two", "text", "none"])
def test_a_view_equals_that_of_the_teacher_alone(pairs, with_regular):
    both = Alignment(aligner(FIRST_PIECES), "both", True, (aligner(SECOND_PIECES),))
    batch = collate(pairs, PLACE, RULES, with_regular, both, (RULES[0],))
    assert len(batch.more) == 1 and batch.seen_by(0) is batch
    for number, own in enumerate((aligner(FIRST_PIECES), aligner(SECOND_PIECES))):
        alone = collate(
            [pair.seen_by(number) for pair in pairs], PLACE.seen_by(number), RULES, with_regular,
            Alignment(own, "both", True),
        )  # fmt: skip
        seen = batch.seen_by(number)
        assert same(seen.teacher, alone.teacher) and same(seen.student, alone.student)
        assert same(seen.shared_bytes, alone.shared_bytes)
        assert seen.num_teacher_rows == alone.num_teacher_rows
        assert seen.num_student_rows == alone.num_student_rows
    if pairs is PAIRS:
        assert batch.num_teacher_rows != batch.more[0].num_teacher_rows


def test_views_move_to_a_device_and_are_among_the_calls():
    batch = collate(PAIRS, PLACE, RULES, False, None, ({"pixels": "rows"},))
    moved = to_device(batch, torch.device("meta"))
    assert moved.more[0].teacher.labels_N.device.type == "meta"
    # a loader that pins memory gives a list
    assert same(to_device(batch._replace(more=list(batch.more)), torch.device("cpu")), batch)
    assert calls([batch]) == "1 micro-batches: " + ">".join(["text+pixels"] * 3)
    alone = collate([PAIR], PLACEHOLDER, RULES, False)
    assert calls([alone]) == "1 micro-batches: text+pixels>text+pixels" and alone.more == ()


class Side:
    """One token per letter of a message, then an end."""

    reads_images, vision_rules, digest = False, {}, ""

    def __init__(self, max_length, factor=1, joins=False):
        self.max_length, self.factor, self.joins = max_length, factor, joins

    def encode(self, messages, images):
        ids, answers = [], []
        for message in messages:
            start = len(ids)
            ids += [1] * (len(message["content"]) * self.factor) + [0]
            if message["role"] == "assistant":
                answers.append((start, len(ids)))
        spans = answers[-1:] if self.joins else answers
        return EncodedChat(torch.tensor(ids), tuple(spans), {}, {})


def conversation(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_all_sides_keep_the_same_turns():
    messages = conversation("ab", "c", "de", "f")  # 10 tokens
    long = Side(100)
    pair = encode_pair(messages, [], {"teacher": long, "teacher 2": Side(9), "student": long})
    assert pair.is_truncated and [len(side.answers) for side in pair.sides] == [1, 1, 1]
    pair = encode_pair(messages, [], {"teacher": long, "teacher 2": Side(40, 3), "student": long})
    assert [len(side.input_ids_T) for side in pair.sides] == [10, 22, 10]
    assert pair.seen_by(1).sides == (pair.more[0], pair.student)
    with pytest.raises(Unusable, match="longer than max_length"):
        encode_pair(messages, [], {"teacher": long, "teacher 2": Side(3), "student": long})
    with pytest.raises(Unusable, match="different numbers of turns"):
        sides = {"teacher": long, "teacher 2": Side(99, joins=True), "student": long}
        encode_pair(messages, [], sides)
