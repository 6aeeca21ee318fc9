"""Turns stored conversations (LLaVA, ShareGPT, chat, FineVision) into messages.

A message's image parts come with slots: what the item says about which picture stands there.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data_tools.sources import assistant
from data_tools.sources.files import field_of
from data_tools.sources.keys import Seen, is_blank
from genrecal_ds.data.decode import SampleError

TURN_KEYS = ("conversations", "conversation", "messages", "texts")
VALUE_KEYS = ("image", "image_url", "path", "url", "bytes", "file_name", "image_path")
_LOSS_KEYS = ("loss", "weight", "train")
TURN_PARTS = (
    "from", "role", "value", "content", "user", "assistant", "reasoning_content", "tool_calls",
    "type", "text", "index", *_LOSS_KEYS,
)  # fmt: skip
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
MARK = re.compile(r"\n?<image>\n?")
NUMBERED_MARK = re.compile(r"\n?<image[ _]?(\d{1,3})>\n?")


@dataclass(frozen=True)
class Slot:
    """The place of a picture. index: in the item's list; number: as `<image 2>` counts."""

    turn: int
    index: int | None = None
    value: Any = None
    number: int | None = None

    @property
    def is_positional(self) -> bool:
        return self.index is None and self.value is None and self.number is None


class Turns(NamedTuple):
    """Messages in HF chat format, and a slot for each of their image parts, in order."""

    messages: list[dict[str, Any]]
    slots: list[Slot]

    @property
    def shown(self) -> str:
        """All texts, to look for a text in them."""
        parts = (part for message in self.messages for part in message["content"])
        return "\n".join(part["text"] for part in parts if part["type"] == "text")


def read_turns(item: dict[str, Any], key: str, mark: re.Pattern[str], seen: Seen) -> Turns:
    """The turns under one key: {from, value}, {role, content} or {user, assistant}.

    Raises SampleError: field, turn, role, video, image_in_answer, loss_flag, ...
    """
    seen.read[key] = None
    stored = item[key]
    if isinstance(stored, str):
        stored = _from_json(key, stored)
    turns = Turns([], [])
    for number, turn in enumerate(field_of({key: stored}, key, list)):
        if not isinstance(turn, dict):
            raise SampleError("turn", f"turn {number} is not an object")
        turn = seen.kept(turn, "turn.")
        if key == "texts":
            _add_pair(turns, turn, mark, seen)
        else:
            _add(turns, turn, number, mark, seen)
    return turns


def question_turns(text: str, mark: re.Pattern[str]) -> Turns:
    """One question; the line breaks around a mark belong to the mark, as in LLaVA's templates."""
    slots: list[Slot] = []
    content = split_marks(text, mark, 0, slots)
    return Turns([{"role": "user", "content": content}], slots)


def split_marks(
    text: str, mark: re.Pattern[str], turn: int, slots: list[Slot]
) -> list[dict[str, str]]:
    """Split a text at its marks; a turn without any text keeps one empty part for the checker."""
    parts: list[dict[str, str]] = []
    position = 0
    for found in [*mark.finditer(text), None]:
        piece = text[position : found.start() if found else None]
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if found:
            number = int(found[1]) if mark.groups else None
            parts.append({"type": "image"})
            slots.append(Slot(turn, number=number))
            position = found.end()
    return parts or [{"type": "text", "text": ""}]


def has_numbered_marks(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether questions hold marks such as `<image 1>`."""
    return any(
        part["type"] == "text" and NUMBERED_MARK.search(part["text"])
        for message in messages
        if message["role"] != "assistant"
        for part in message["content"]
    )


def up_to_last_taught(turns: Turns) -> tuple[Turns, int]:
    """(the turns without what follows the last taught answer, how many were left out).

    Untaught answers are context. Behind the last taught one there is nothing that they could be
    the context of. Raises SampleError no_taught where every answer is untaught.
    """
    messages = turns.messages
    if not any("taught" in message for message in messages):
        return turns, 0
    taught = [n for n, m in enumerate(messages) if m["role"] == "assistant" and "taught" not in m]
    if not taught:
        raise SampleError("no_taught", "every answer has loss false or weight 0")
    kept = taught[-1] + 1
    slots = [slot for slot in turns.slots if slot.turn < kept]
    return Turns(messages[:kept], slots), len(messages) - kept


def with_system(turns: Turns, text: str) -> Turns:
    """Put a system prompt in front. Raises SampleError system where the turns have another."""
    if not text:
        return turns
    own = ["".join(part.get("text", "") for part in message["content"])
           for message in turns.messages if message["role"] == "system"]  # fmt: skip
    if own:
        if own != [text]:
            raise SampleError("system", "a system prompt, and another in the turns")
        return turns
    message = {"role": "system", "content": [{"type": "text", "text": text}]}
    slots = [replace(slot, turn=slot.turn + 1) for slot in turns.slots]
    return Turns([message, *turns.messages], slots)


def _from_json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("field", f"{key}: {text!r:.60} is neither a list nor JSON") from error


def _add_pair(turns: Turns, turn: dict[str, Any], mark: re.Pattern[str], seen: Seen) -> None:
    """Append a question and its answer."""
    number = len(turns.messages)
    question, answer = (field_of(turn, name, str) for name in ("user", "assistant"))
    content = split_marks(question, mark, number, turns.slots)
    turns.messages.extend([{"role": "user", "content": content}, assistant(answer)])
    seen.leave({k: v for k, v in turn.items() if k not in ("user", "assistant")}, "turn.")


def _add(
    turns: Turns, turn: dict[str, Any], number: int, mark: re.Pattern[str], seen: Seen
) -> None:
    """Append one message with what it says about being taught."""
    role = _either(turn, ("from", "role"), number)
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError("role", f"turn {number}: {role!r:.40} is none of {sorted(_ROLES)}")
    role, value = _ROLES[role], _either(turn, ("value", "content"), number)
    if turn.get("tool_calls"):
        raise SampleError("tools", f"turn {number}: tool calls are not supported")
    add_parts = _answer_parts if role == "assistant" else _question_parts
    message: dict[str, Any] = {"role": role}
    message["content"] = add_parts(value, number, mark, turns.slots, seen)
    rest = {"from", "role", "value", "content", "tool_calls"}
    if role == "assistant":
        rest |= {*_LOSS_KEYS, "reasoning_content"}
        _add_reasoning(message, turn.get("reasoning_content"), number)
        if not _is_taught(turn, number):
            message["taught"] = False
            seen.read["turn.loss"] = None
    else:
        rest |= {*_LOSS_KEYS}  # questions are never taught
        seen.unread |= {f"turn.{key}": None for key in _LOSS_KEYS if key in turn}
    turns.messages.append(message)
    seen.leave({key: value for key, value in turn.items() if key not in rest}, "turn.")


def _add_reasoning(message: dict[str, Any], reasoning: Any, number: int) -> None:
    """Put reasoning in front of an answer, as templates that know it write it."""
    if is_blank(reasoning):
        return
    if not isinstance(reasoning, str):
        raise SampleError("turn", f"turn {number}: reasoning_content {reasoning!r:.40} is no text")
    answer = "".join(part["text"] for part in message["content"])
    text = f"<think>\n{reasoning.strip()}\n</think>\n\n{answer}"
    message["content"] = [{"type": "text", "text": text}]


def _either(turn: dict[str, Any], keys: Sequence[str], number: int) -> Any:
    """The value of two spellings of a key, of which a table leaves one null."""
    values = [turn[key] for key in keys if key in turn]
    if len(values) == 2 and values[0] != values[1]:
        raise SampleError("turn", f"turn {number}: {' and '.join(keys)} differ")
    return values[0] if values else None


def _is_taught(turn: dict[str, Any], number: int) -> bool:
    flags = {key: turn[key] for key in _LOSS_KEYS if key in turn}
    if any(flag not in (0, 1) or isinstance(flag, str) for flag in flags.values()):
        raise SampleError("loss_flag", f"turn {number}: {flags}: neither true nor false, 1 nor 0")
    if len(set(map(bool, flags.values()))) > 1:
        raise SampleError("loss_flag", f"turn {number}: {flags} contradict each other")
    return all(flags.values())


def _question_parts(
    value: Any, number: int, mark: re.Pattern[str], slots: list[Slot], seen: Seen
) -> list[dict[str, str]]:
    if isinstance(value, str):
        return split_marks(value, mark, number, slots)
    if not isinstance(value, list):
        raise SampleError("turn", f"turn {number}: {value!r:.40} is neither text nor parts")
    parts: list[dict[str, str]] = []
    for part in value:
        kind, content = _stored_part(part, number, seen)
        if kind == "text":
            # a mark inside a part counts as well: a model's own token may be spelled like it
            parts += split_marks(content, mark, number, slots)
        else:
            parts.append({"type": "image"})
            slots.append(_slot(content, number))
    return parts


def _answer_parts(
    value: Any, number: int, mark: re.Pattern[str], slots: list[Slot], seen: Seen
) -> list[dict[str, str]]:
    """The parts of an answer: a mark in it is text, and a picture in it is refused."""
    if isinstance(value, str):
        return [{"type": "text", "text": "" if is_invisible(value) else value}]
    if not isinstance(value, list):
        raise SampleError("turn", f"turn {number}: {value!r:.40} is neither text nor parts")
    parts = []
    for part in value:
        kind, content = _stored_part(part, number, seen)
        if kind == "image":
            raise SampleError("image_in_answer", f"turn {number}: a picture inside an answer")
        parts.append({"type": "text", "text": "" if is_invisible(content) else content})
    return parts


def is_invisible(text: str) -> bool:
    """Whether a text has no visible character; "nan" is one to an answer."""
    return is_blank(text) and "nan" not in text.lower() and "<NA>" not in text


def _stored_part(part: Any, number: int, seen: Seen) -> tuple[str, Any]:
    """("text", text) or ("image", the part)."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise SampleError("turn", f"turn {number}: part {part!r:.40} is neither text nor image")
    part = seen.kept(part, "part.")
    kind = part.get("type")
    if kind in ("video", "audio"):
        raise SampleError("video", f"turn {number}: {kind} is not supported")
    is_image = kind in ("image", "image_url")
    is_image |= kind is None and "text" not in part and any(key in part for key in VALUE_KEYS)
    if is_image:
        known = {"type", "index", *VALUE_KEYS}
    elif kind in ("text", None) and isinstance(part.get("text"), str):
        known = {"type", "text", "index"}
    else:
        raise SampleError("turn", f"turn {number}: part {part!r:.40} is neither text nor image")
    seen.leave({key: value for key, value in part.items() if key not in known}, "part.")
    return ("image", part) if is_image else ("text", part["text"])


def _slot(part: dict[str, Any], number: int) -> Slot:
    """What an image part says about its picture."""
    index = part.get("index")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
        raise SampleError("part_index", f"turn {number}: {index!r:.40} is no index")
    value: Any = {key: part[key] for key in VALUE_KEYS if not is_blank(part.get(key))} or None
    if value is not None and len(value) == 1:
        (value,) = value.values()  # of several, PictureReader knows which one it is
    return Slot(number, index, value)
