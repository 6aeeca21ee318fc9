"""What happens to a conversation that is longer than a model's max_length: three policies."""

from typing import Any

import pytest
import torch

from genrecal_ds.data.pair import (
    EncodedChat,
    TooLong,
    Unusable,
    encode_pair,
    first_turns,
    is_taught,
)

pytestmark = pytest.mark.unit


class Letters:
    """One token a character (or two), one for the end of an answer."""

    reads_images = False
    vision_rules: dict[str, str] = {}
    digest = ""

    def __init__(self, max_length: int, per_letter: int = 1) -> None:
        self.max_length, self.per_letter = max_length, per_letter

    def rewrites(self, messages: list) -> bool:
        return False

    def encode(self, messages: list, images: list, last_turn: bool = False) -> EncodedChat:
        ids: list[int] = []
        answers = []
        for message in messages:
            start = len(ids)
            for part in message["content"]:
                letters = part.get("text", "#")
                ids += [ord(letter) for letter in letters for _ in range(self.per_letter)]
            if message["role"] == "assistant":
                ids.append(0)
                if is_taught(message):
                    answers.append((start, len(ids)))
        return EncodedChat(torch.tensor(ids), tuple(answers), {}, {})


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def text_of(view: EncodedChat, per_letter: int = 1) -> str:
    return "".join(map(chr, view.input_ids_T[::1].tolist())).replace("\0", "|")


def sides(teacher: int, student: int) -> dict[str, Any]:
    return {"teacher": Letters(teacher, 2), "student": Letters(student)}


CHAT = chat(("a long document, then what?", "yes"), ("and?", "no"))
WHOLE = len("a long document, then what?yes|and?no|")


def test_what_fits_is_left_alone() -> None:
    for policy in ("drop", "error", "truncate_question"):
        pair = encode_pair(CHAT, [], sides(200, WHOLE), policy)  # type: ignore[arg-type]
        assert not pair.is_truncated
        assert text_of(pair.student) == "a long document, then what?yes|and?no|"


def test_drop_leaves_out_turns_and_says_so() -> None:
    pair = encode_pair(CHAT, [], sides(200, WHOLE - 1), "drop")
    assert pair.is_truncated and text_of(pair.student) == "a long document, then what?yes|"
    assert pair.teacher is not None and len(pair.teacher.answers) == 1, "on both sides"
    with pytest.raises(Unusable, match="longer than max_length"):
        encode_pair(CHAT, [], sides(200, 10), "drop")


def test_error_names_both_sides() -> None:
    with pytest.raises(TooLong, match="teacher 74 of 200, student 38 of 37 tokens"):
        encode_pair(CHAT, [], sides(200, 37), "error")


@pytest.mark.parametrize("student_length", [WHOLE - 1, 30, 22, 13])
@pytest.mark.parametrize("teacher_length", [1000, 60, 45])
def test_truncate_question_keeps_answers_and_the_end_of_the_question(
    student_length: int, teacher_length: int
) -> None:
    pair = encode_pair(CHAT, [], sides(teacher_length, student_length), "truncate_question")
    assert pair.teacher is not None and pair.is_truncated
    text = text_of(pair.student)
    assert text.endswith("?yes|and?no|") and "a long document, then what?".endswith(
        text.split("yes|")[0]
    )
    assert len(pair.student.input_ids_T) <= student_length
    assert len(pair.teacher.input_ids_T) <= teacher_length
    doubled = "".join(2 * letter for letter in text).replace("||", "|")
    assert text_of(pair.teacher) == doubled, "both models read the same words"
    # not a character less than what fits
    longer_student, longer_teacher = len(text) + 1, len(doubled) + 2
    assert longer_student > student_length or longer_teacher > teacher_length


def test_truncate_question_shortens_the_next_text_when_one_is_not_enough() -> None:
    messages = chat(("x" * 40, "yes"), ("y" * 30, "no"))
    pair = encode_pair(messages, [], sides(1000, 20), "truncate_question")
    text = text_of(pair.student)
    assert text == "xyes|" + "y" * (20 - len("xyes|no|")) + "no|"
    with pytest.raises(Unusable, match="longer than max_length"):
        encode_pair(chat(("q", "a long answer")), [], sides(1000, 5), "truncate_question")


def test_truncate_question_falls_back_to_turns_where_answers_are_long() -> None:
    messages = chat(("q", "yes"), ("r", "a very long answer"))
    pair = encode_pair(messages, [], sides(1000, 10), "truncate_question")
    assert text_of(pair.student) == "qyes|" and pair.is_truncated
    assert messages == chat(("q", "yes"), ("r", "a very long answer")), "the input is not changed"


def test_an_untaught_answer_counts_as_no_turn() -> None:
    messages = chat(("q", "WRONG"), ("fix", "right"), ("more?", "no"))
    messages[1]["taught"] = False
    assert first_turns(messages, 1) == messages[:4] and first_turns(messages, 2) == messages
    whole = encode_pair(messages, [], sides(200, 100))
    assert len(whole.student.answers) == len(whole.teacher.answers) == 2  # type: ignore[union-attr]
    cut = encode_pair(messages, [], sides(200, len("qWRONG|fixright|")), "drop")
    assert text_of(cut.student) == "qWRONG|fixright|" and cut.is_truncated
    assert [text_of(cut.student)[a:b] for a, b in cut.student.questions] == ["qWRONG|fix"]
