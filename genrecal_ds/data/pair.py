"""Tokenises one sample twice, for teacher and student, by rules that both sides share.

Tokenisation is injected (`Encoder`), so this room knows no model. The rules that both sides
must obey together live here: same turns, same truncation, no empty question, one sequence or many.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from PIL.Image import Image
from torch import Tensor

Messages = list[dict[str, Any]]
LongPolicy = Literal["drop", "error", "truncate_question"]


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
        """Half-open spans q_k: the tokens after a_(k-1) and before a_k."""
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
    reads_images: bool
    vision_rules: dict[str, str]  # how vision inputs become a batch: batch.join
    digest: str  # sha256 hex of the files that decide the tokens

    def encode(
        self, messages: Messages, images: list[Image], last_turn: bool = False
    ) -> EncodedChat:
        """Encode every answer of a chat; last_turn: the last answer alone."""
        ...

    def rewrites(self, messages: Messages) -> bool:
        """Whether an earlier answer is written otherwise once another turn follows."""
        ...


class TooLong(Unusable):
    """A conversation is longer than max_length, and the recipe says that this is an error."""


class NothingFits(Unusable):
    """Not even the first turn of a conversation fits in max_length."""


@dataclass(frozen=True)
class Pair:
    """The two views. teacher is None in stages without one. Placeholders teach nothing."""

    teacher: EncodedChat | None
    student: EncodedChat
    is_placeholder: bool = False
    is_truncated: bool = False  # turns or question text were left out to fit max_length

    @property
    def sides(self) -> tuple[EncodedChat, ...]:
        return (self.student,) if self.teacher is None else (self.teacher, self.student)


Encoders = dict[str, Encoder]  # by side: `teacher` and `student`, or `student` alone


def encode_pairs(
    messages: Messages, images: list[Image], encoders: Encoders, too_long: LongPolicy = "drop"
) -> list[Pair]:
    """Tokenise a conversation: one pair, or one a turn where a side's template rewrites turns.

    A template that writes an answer otherwise once another turn follows (without its reasoning, or
    with another end) has no single sequence in which every turn stands as generation meets it. So
    each turn is taught in a sequence of its own, behind its history. Raises Unusable.
    """
    if not any(encoder.rewrites(messages) for encoder in encoders.values()):
        return [encode_pair(messages, images, encoders, too_long)]
    pairs: list[Pair] = []
    num_turns = sum(map(is_taught, messages))
    for turn in range(1, num_turns + 1):
        part = first_turns(messages, turn)
        try:
            pairs.append(encode_pair(part, images[: _num_images(part)], encoders, too_long, True))
        except NothingFits:
            if not pairs:
                raise
            return [*pairs[:-1], replace(pairs[-1], is_truncated=True)]  # later turns are longer
    return pairs


def encode_pair(
    messages: Messages,
    images: list[Image],
    encoders: Encoders,
    too_long: LongPolicy = "drop",
    last_turn: bool = False,
) -> Pair:
    """Tokenise a conversation for each side: the same text, the same turns, answers whole.

    last_turn: teach the last turn alone, with what stands before it as its question.
    Longer than a side's max_length: `drop` leaves out the turns that do not fit, and the sample
    when none does; `truncate_question` shortens question text first; `error` raises TooLong.
    Raises Unusable: unequal turns, an empty question, nothing fits, or an image lost to
    truncation (never on one side only).
    """
    views = _views(messages, images, encoders, last_turn)
    turns = len(views["student"].answers)
    if _fitting_turns(views, encoders) == turns:
        return _pair(views)
    if too_long == "error":
        sizes = ", ".join(
            f"{side} {len(view.input_ids_T)} of {encoders[side].max_length}"
            for side, view in views.items()
        )
        raise TooLong(f"longer than max_length: {sizes} tokens")
    if too_long == "truncate_question":
        shorter = _shorten_questions(messages, images, encoders, last_turn)
        if shorter is not None:
            return _pair(shorter, is_truncated=True)
    num_turns = _fitting_turns(views, encoders)
    if num_turns == 0:
        raise NothingFits("longer than max_length")
    if _num_images(_after_turns(messages, num_turns)):
        raise Unusable("max_length would cut an image off")
    return _pair({side: view.cut(num_turns) for side, view in views.items()}, is_truncated=True)


def _pair(views: dict[str, EncodedChat], is_truncated: bool = False) -> Pair:
    return Pair(views.get("teacher"), views["student"], is_truncated=is_truncated)


def _views(
    messages: Messages, images: list[Image], encoders: Encoders, last_turn: bool
) -> dict[str, EncodedChat]:
    views = {
        side: encoder.encode(messages, images, last_turn) for side, encoder in encoders.items()
    }
    if len({len(view.answers) for view in views.values()}) != 1:
        raise Unusable("teacher and student see different numbers of turns")
    if any(start == end for view in views.values() for start, end in view.questions):
        raise Unusable("a turn without question tokens")
    return views


def _fitting_turns(views: dict[str, EncodedChat], encoders: Encoders) -> int:
    """How many turns, from the first, fit on every side."""
    return min(
        sum(end <= encoders[side].max_length for _, end in view.answers)
        for side, view in views.items()
    )


def _shorten_questions(
    messages: Messages, images: list[Image], encoders: Encoders, last_turn: bool
) -> dict[str, EncodedChat] | None:
    """Return views that fit, the longest question texts cut at their START; None if impossible.

    In a long question the request stands at the end, behind its document. The text is cut before
    both tokenisations, so that both models read the same words.
    """
    texts = [
        (len(part["text"]), turn, number)
        for turn, message in enumerate(messages)
        if message["role"] != "assistant" and not isinstance(message["content"], str)
        for number, part in enumerate(message["content"])
        if part["type"] == "text"
    ]
    messages = copy.deepcopy(messages)

    def attempt(turn: int, number: int, text: str) -> dict[str, EncodedChat] | None:
        messages[turn]["content"][number]["text"] = text
        views = _views(messages, images, encoders, last_turn)
        fits = _fitting_turns(views, encoders) == len(views["student"].answers)
        return views if fits else None

    for length, turn, number in sorted(texts, key=lambda text: -text[0]):
        whole = messages[turn]["content"][number]["text"]
        best, kept, failed = attempt(turn, number, whole[-1:]), 1, length
        if best is None:
            continue  # even a single character of it is too much: the next text shrinks as well
        while failed - kept > 1:
            middle = (kept + failed) // 2
            views = attempt(turn, number, whole[-middle:])
            best, kept, failed = (views, middle, failed) if views else (best, kept, middle)
        return best
    return None


def is_taught(message: dict[str, Any]) -> bool:
    """Whether a message is an answer to learn; one with `taught: False` is part of a question."""
    return message["role"] == "assistant" and message.get("taught", True)


def first_turns(messages: Messages, num_turns: int) -> Messages:
    """The chat up to its num_turns-th taught answer."""
    rest = _after_turns(messages, num_turns)
    return messages[: len(messages) - len(rest)]


def _after_turns(messages: Messages, num_turns: int) -> Messages:
    answered = 0
    for position, message in enumerate(messages):
        answered += is_taught(message)
        if answered == num_turns:
            return messages[position + 1 :]
    return []


def _num_images(messages: Messages) -> int:
    return sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
