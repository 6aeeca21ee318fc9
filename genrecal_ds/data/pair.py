"""One sample, tokenised twice: the teacher's and the student's view of the same conversation.

Tokenisation is injected (`Encoder`), so this room knows no model. The rules that both sides
must obey together live here: same turns, same truncation, no empty question.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor

Messages = list[dict[str, Any]]


class Unusable(ValueError):
    """A sample that cannot be used; the message is a short reason, counted and logged."""


@dataclass(frozen=True)
class EncodedChat:
    """One conversation in one model's tokens.

    answers: half-open token spans a_k, the end-of-turn token included. The sequence ends with
    the last answer. per_token holds further int64 [T] inputs; vision whatever else the model
    takes, with a leading dimension of images, tiles or patches.
    """

    input_ids_T: Tensor
    answers: tuple[tuple[int, int], ...]
    per_token: dict[str, Tensor]
    vision: dict[str, Tensor]

    @property
    def questions(self) -> tuple[tuple[int, int], ...]:
        """Half-open spans q_k: what stands before a_k and after a_(k-1)."""
        ends = (0, *(end for _, end in self.answers))
        return tuple((end, start) for end, (start, _) in zip(ends, self.answers, strict=False))

    def cut(self, num_turns: int) -> "EncodedChat":
        """Keep the first num_turns turns; vision inputs are kept whole."""
        end = self.answers[num_turns - 1][1]
        per_token = {key: value[:end] for key, value in self.per_token.items()}
        return replace(
            self,
            input_ids_T=self.input_ids_T[:end],
            answers=self.answers[:num_turns],
            per_token=per_token,
        )


class Encoder(Protocol):
    """Turns a chat into one model's tokens; raises Unusable with a reason."""

    max_length: int
    vision_rules: dict[str, str]  # how vision inputs become a batch: rows | tiles

    def encode(self, messages: Messages, images: list[Image]) -> EncodedChat: ...


@dataclass(frozen=True)
class Pair:
    """The two views. teacher is None in stages without one. Placeholders teach nothing."""

    teacher: EncodedChat | None
    student: EncodedChat
    is_placeholder: bool = False

    @property
    def sides(self) -> tuple[EncodedChat, ...]:
        return (self.student,) if self.teacher is None else (self.teacher, self.student)


def encode_pair(
    messages: Messages, images: list[Image], teacher: Encoder | None, student: Encoder
) -> Pair:
    """Both tokenisations of a conversation, cut to the same turns.

    Raises Unusable: unequal turns, an empty question, too long even with one turn, or an image
    lost to truncation (never on one side only).
    """
    encoders = {"teacher": teacher, "student": student}
    views = {
        side: encoder.encode(messages, images)
        for side, encoder in encoders.items()
        if encoder is not None
    }
    turns = {side: len(view.answers) for side, view in views.items()}
    if len(set(turns.values())) != 1:
        raise Unusable("teacher and student see different numbers of turns")
    if any(start == end for view in views.values() for start, end in view.questions):
        raise Unusable("a turn without question tokens")
    num_turns = min(
        sum(end <= encoders[side].max_length for _, end in view.answers)  # type: ignore[union-attr]
        for side, view in views.items()
    )
    if num_turns == 0:
        raise Unusable("longer than max_length")
    if num_turns < turns["student"]:
        if _has_image(_after_turns(messages, num_turns)):
            raise Unusable("max_length would cut an image off")
        views = {side: view.cut(num_turns) for side, view in views.items()}
    return Pair(views.get("teacher"), views["student"])


def _after_turns(messages: Messages, num_turns: int) -> Messages:
    answered = 0
    for position, message in enumerate(messages):
        answered += message["role"] == "assistant"
        if answered == num_turns:
            return messages[position + 1 :]
    return []


def _has_image(messages: Messages) -> bool:
    return any(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
