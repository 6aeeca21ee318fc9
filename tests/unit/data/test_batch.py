"""Golden samples, written by hand: the row shift, several turns, the layout, the labels."""

import pytest
import torch

from genrecal_ds import IGNORE
from genrecal_ds.data.batch import collate, collate_vision
from genrecal_ds.data.byte_matching import ByteMatcher
from genrecal_ds.data.pair import EncodedChat, Pair, Unusable, encode_pair

pytestmark = pytest.mark.unit
RULES = ({"pixels": "rows"}, {"pixels": "rows"})


def chat(ids, answers, pixels=1):
    vision = {"pixels": torch.ones(pixels, 2)} if pixels else {}
    return EncodedChat(torch.tensor(ids), tuple(answers), {}, vision)


# Teacher: q1 = 10 11 12, a1 = 13 14 1, q2 = 15 16, a2 = 17 1     (1 ends a turn)
TEACHER = chat([10, 11, 12, 13, 14, 1, 15, 16, 17, 1], [(3, 6), (8, 10)])
# Student: q1 = 20 21, a1 = 22 2, q2 = 23 24 25, a2 = 26 27 28 2  (2 ends a turn)
STUDENT = chat([20, 21, 22, 2, 23, 24, 25, 26, 27, 28, 2], [(2, 4), (7, 11)])
PAIR = Pair(TEACHER, STUDENT)
PLACEHOLDER = Pair(chat([10, 13, 1], [(1, 3)]), chat([20, 22, 2], [(1, 3)]), is_placeholder=True)


def test_row_shift_and_labels_of_two_turns():
    batch = collate([PAIR], PLACEHOLDER, RULES, with_regular=False)
    teacher, student = batch.teacher, batch.student
    # z: the last q row and all answer rows but the last; labels: the whole answer
    assert teacher.targets_N.tolist() == [2, 3, 4, 7, 8]
    assert teacher.labels_N.tolist() == [13, 14, 1, 17, 1]
    assert teacher.boundary_N.tolist() == [True, False, False, True, False]
    assert student.rows_M.tolist() == [1, 2, 6, 7, 8, 9]
    assert student.labels_M.tolist() == [22, 2, 26, 27, 28, 2]
    assert student.boundary_M.tolist() == [True, False, True, False, False, False]
    assert (batch.num_teacher_rows, batch.num_student_rows, batch.num_samples) == (5, 6, 1)


def test_mixed_packing_of_two_turns():
    layout = collate([PAIR], PLACEHOLDER, RULES, with_regular=False).teacher.layout
    # s0 s1 | a a a | s4 s5 s6 | a a      with answer rows 0..4 written as -1..-5
    assert layout.source_P.tolist() == [0, 1, -1, -2, -3, 4, 5, 6, -4, -5]
    assert layout.position_ids_P.tolist() == list(range(10))
    assert layout.own_position_ids_P.tolist() == [0, 1, 3, 4, 5, 4, 5, 6, 8, 9]
    # turn 1 predicts from s1 and its first two answer rows, turn 2 from s6 and one answer row
    assert layout.loss_rows.tolist() == [1, 2, 3, 7, 8]
    assert (layout.num_sequences, layout.max_seqlen) == (1, 10)
    assert layout.cu_seqlens.tolist() == [0, 10] and layout.cu_seqlens.dtype == torch.int32


def test_regular_pass_shares_answer_rows_and_loss_rows():
    teacher = collate([PAIR], PLACEHOLDER, RULES, with_regular=True).teacher
    assert teacher.rows_A.tolist() == [3, 4, 5, 8, 9, 0, 1, 2, 6, 7]  # answers, then questions
    mixed, regular = teacher.layout.source_P[:10], teacher.layout.source_P[10:]
    assert mixed.tolist() == [0, 1, -1, -2, -3, 4, 5, 6, -4, -5]
    assert regular.tolist() == [-6, -7, -8, -1, -2, -3, -9, -10, -4, -5]
    assert teacher.layout.loss_rows[5:].tolist() == [12, 13, 14, 17, 18]
    assert teacher.layout.own_position_ids_P[10:].tolist() == list(range(10))
    assert teacher.layout.sequence_P.tolist() == [0] * 10 + [1] * 10


# Answers "ab" and "xyz": a, b, end and xyz, end to the teacher; ab, end and x, y, z, end here.
PIECES = {13: b"a", 14: b"b", 17: b"xyz", 1: None, 22: b"ab", 26: b"x", 27: b"y", 28: b"z", 2: None}


def test_shared_bytes_count_rows_over_all_turns_and_leave_placeholders_out():
    matcher = ByteMatcher({**PIECES, 10: None}, PIECES)
    shared = collate([PAIR], PLACEHOLDER, RULES, False, matcher).shared_bytes
    # a b end | x y z end: rows 0 to 5 of the student, 0 to 4 of the teacher
    assert shared.student_I.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert shared.student_depth_I.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert shared.teacher_I.tolist() == [0, 1, 2, 3, 3, 3, 4]
    assert shared.teacher_depth_I.tolist() == [0, 0, 0, 0, 1, 2, 0]
    nothing = collate([], PLACEHOLDER, RULES, False, matcher).shared_bytes
    assert [len(part) for part in nothing] == [0, 0, 0, 0]


def test_rows_are_offset_by_the_padded_width():
    short = Pair(chat([10, 13, 1], [(1, 3)]), chat([20, 22, 23, 2], [(1, 4)]))
    batch = collate([PAIR, short], PLACEHOLDER, RULES, with_regular=False)
    assert batch.teacher.targets_N.tolist()[5:] == [10, 11]  # teacher width 10
    assert batch.student.rows_M.tolist()[6:] == [11, 12, 13]  # student width 11
    assert batch.teacher.layout.source_P.tolist()[10:] == [11, -6, -7]
    assert batch.student.inputs.attention_mask.sum(1).tolist() == [11, 4]
    # padding repeats the end-of-turn token, never an image token
    assert batch.student.inputs.input_ids[1].tolist() == [20, 22, 23, 2] + [2] * 7


def test_text_only_micro_batch_takes_the_placeholder_along():
    text = Pair(chat([10, 13, 1], [(1, 3)], 0), chat([20, 22, 2], [(1, 3)], 0))
    batch = collate([text], PLACEHOLDER, RULES, with_regular=True)
    assert batch.student.inputs.input_ids.shape[0] == 2  # its vision tower must run
    assert batch.teacher.labels_N.tolist() == [13, 1, IGNORE, IGNORE]
    assert batch.student.labels_M.tolist() == [22, 2, IGNORE, IGNORE]
    assert (batch.num_teacher_rows, batch.num_student_rows, batch.num_samples) == (2, 2, 1)
    empty = collate([], PLACEHOLDER, RULES, with_regular=False)
    assert (empty.num_teacher_rows, empty.num_student_rows, empty.num_samples) == (0, 0, 0)


class Fixed:
    vision_rules = {"pixels": "rows"}

    def __init__(self, view, max_length=100):
        self.view, self.max_length = view, max_length

    def encode(self, messages, images, last_turn=False):
        return self.view


def messages(image_in_turn=0):
    turns = []
    for turn in range(2):
        image = [{"type": "image"}] if turn == image_in_turn else []
        turns.append({"role": "user", "content": [*image, {"type": "text", "text": "q"}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": "a"}]})
    return turns


def test_truncation_drops_the_same_turn_on_both_sides():
    pair = encode_pair(
        messages(), [], {"teacher": Fixed(TEACHER), "student": Fixed(STUDENT, max_length=10)}
    )
    assert (len(pair.teacher.input_ids_T), len(pair.student.input_ids_T)) == (6, 4)
    assert pair.teacher.answers == ((3, 6),) and pair.student.answers == ((2, 4),)


@pytest.mark.parametrize(
    "teacher, student, image, reason",
    [
        (Fixed(TEACHER), Fixed(STUDENT, 3), 0, "longer than max_length"),
        (Fixed(TEACHER, 9), Fixed(STUDENT), 1, "max_length would cut an image off"),
        (Fixed(TEACHER.cut(1)), Fixed(STUDENT), 0, "different numbers of turns"),
        (Fixed(chat([3, 1, 4, 1], [(1, 2), (2, 4)])), Fixed(STUDENT), 0, "without question"),
    ],
)
def test_unusable_samples_have_a_reason(teacher, student, image, reason):
    with pytest.raises(Unusable, match=reason):
        encode_pair(messages(image), [], {"teacher": teacher, "student": student})


@pytest.mark.parametrize("with_regular", [False, True])
def test_uses_invert_the_source_map(with_regular):
    """token_align's backward reads them instead of adding atomically."""
    batch = collate([PAIR, PAIR], PLACEHOLDER, RULES, with_regular)
    layout, num_student = batch.teacher.layout, batch.student.inputs.input_ids.numel()
    assert layout.uses_RU.shape[0] == num_student + len(batch.teacher.rows_A)
    assert layout.uses_RU.shape[1] == 1 + with_regular
    rebuilt = torch.full_like(layout.source_P, 999)
    for row, uses in enumerate(layout.uses_RU.tolist()):
        for use in uses:
            if use >= 0:
                rebuilt[use] = row if row < num_student else num_student - 1 - row
    assert torch.equal(rebuilt, layout.source_P)
    assert layout.cu_seqlens.diff().sum() == len(layout.source_P)


def test_numbers_of_patches_count_on_over_samples_and_negatives_stay():
    """As Molmo2 numbers them: of all patches of the batch; a text-only sample has none."""
    samples = [
        {"pixel_values": torch.zeros(2, 5, 3), "pooling": torch.tensor([[0, 9], [-1, 4]])},
        {},
        {"pixel_values": torch.ones(1, 5, 3), "pooling": torch.tensor([[3, -1]])},
        {"pixel_values": torch.ones(3, 5, 3), "pooling": torch.tensor([[14, 0]])},
    ]
    joined = collate_vision(samples, {"pixel_values": "rows", "pooling": "patches"})
    assert joined["pixel_values"].shape == (6, 5, 3)
    assert joined["pooling"].tolist() == [[0, 9], [-1, 4], [13, -1], [29, 15]]
    assert collate_vision([{}], {"pooling": "patches"}) == {}
