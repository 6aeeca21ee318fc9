"""Turns stored conversations (LLaVA, ShareGPT, chat, one question) into messages."""

import math
import re
from typing import Any

from data_tools.sources import assistant, user
from data_tools.sources.files import field_of
from genrecal_ds.data.decode import SampleError

IMAGE_MARK = "<image>"
CONVERSATION_KEYS = frozenset({"conversations", "messages", "question"})
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
_MARK = re.compile(r"\n?<image>\n?")


def to_messages(item: dict[str, Any], num_images: int) -> list[dict[str, Any]]:
    """Return the messages of one item, its pictures where the text has `<image>`.

    Accepts `conversations` ({from, value}), `messages` ({role, content}, content a text or parts)
    or `question` with `answer`. The line breaks around a mark belong to the mark, as in LLaVA's
    templates. Raises SampleError: video, conversations, turn, role, image_count, ...
    """
    if item.get("video") or item.get("videos"):
        raise SampleError("video", "video items are not supported")
    if "conversations" in item or "messages" in item:
        key = "conversations" if "conversations" in item else "messages"
        turns = field_of(item, key, list)
        messages = [_message(turn, number) for number, turn in enumerate(turns)]
        _require_count(messages, num_images)
        return messages
    if "question" in item:
        question = field_of(item, "question", str)
        if IMAGE_MARK in question:
            messages = [{"role": "user", "content": _parts(question)}]
            _require_count(messages, num_images)
        else:
            messages = [user(question.strip(), num_images)]
        return [*messages, assistant(answers_of(item)[0])]
    raise SampleError("conversations", "neither conversations nor messages nor question")


def images_of(item: dict[str, Any]) -> list[Any]:
    """Return the item's pictures as stored: `image` or `images`, one or a list; null is none.

    Raises SampleError image_count where both keys hold pictures: one key would be left out.
    """
    pictures = [value for key in ("image", "images") if (value := item.get(key)) not in (None, [])]
    if len(pictures) > 1:
        raise SampleError("image_count", "both image and images hold pictures")
    if not pictures:
        return []
    return pictures[0] if isinstance(pictures[0], list) else pictures


def answers_of(item: dict[str, Any]) -> list[str]:
    """The accepted answers of a question item: `answers`, else `answer`."""
    answers = item.get("answers") or item.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(_is_answer(answer) for answer in answers):
        raise SampleError("answer", f"answers: {answers!r:.80}")
    return [str(answer) for answer in answers]


def scored_answers(item: dict[str, Any]) -> list[str]:
    """Return answers_of, or nothing where the item is a conversation and has no answers."""
    has_answers = item.get("answers") or item.get("answer") is not None
    return answers_of(item) if has_answers else []


def kind_of(item: dict[str, Any], default: str) -> str:
    """Return the source that the item names, for counting and scoring by kind."""
    kinds = (item.get(key) for key in ("data_source", "source", "kind"))
    return next((kind for kind in kinds if isinstance(kind, str) and kind), default)


def id_of(item: dict[str, Any]) -> str:
    """Return the item's own id. It is never used as a name: it may repeat or hold anything."""
    value = item.get("id", "")
    return str(value) if isinstance(value, str | int) else ""


def _is_answer(value: Any) -> bool:
    """Whether a value is an answer: text or a number. NaN means that a table has none."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise SampleError("turn", f"turn {number} is not an object")
    role = turn.get("from", turn.get("role"))
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError("role", f"turn {number}: {role!r:.40} is none of {sorted(_ROLES)}")
    value = turn.get("value", turn.get("content"))
    if isinstance(value, str):
        return {"role": _ROLES[role], "content": _parts(value)}
    if isinstance(value, list):
        parts = [part for stored in value for part in _stored_part(stored, number)]
        return {"role": _ROLES[role], "content": parts}
    raise SampleError("turn", f"turn {number}: {value!r:.40} is neither text nor parts")


def _parts(text: str) -> list[dict[str, str]]:
    """Split a text at its marks; a turn without any text keeps one empty part for the checker."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(_MARK.split(text)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def _stored_part(part: Any, number: int) -> list[dict[str, str]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        # a mark inside a part counts as well: a model's own image token may be spelled like it
        return _parts(part["text"])
    if kind in ("image", "image_url"):
        return [{"type": "image"}]
    if kind == "video":
        raise SampleError("video", "video items are not supported")
    raise SampleError("turn", f"turn {number}: part {part!r:.40} is neither text nor image")


def _require_count(messages: list[dict[str, Any]], num_images: int) -> None:
    """Refuse a wrong count of pictures: a guess would shift every later picture."""
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marks != num_images:
        raise SampleError("image_count", f"{marks} <image> marks but {num_images} images")
