"""Sets the texts of a chat apart, and puts marks in their place.

A template that writes a chat with marks shows what it writes around the texts.
"""

import re
from typing import Any, NamedTuple

from genrecal_ds.data.pair import Messages, Unusable

THINKING = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
MARK = "\ue000"  # for private use: no text of a template has it
NAMES = {"system": "a system prompt", "user": "a question", "assistant": "an answer"}


class Piece(NamedTuple):
    """One text that a template must write. An answer that shows its reasoning has two."""

    turn: int  # of the messages
    role: str
    text: str
    is_reasoning: bool = False

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant" and not self.is_reasoning


class Chat(NamedTuple):
    """A chat with its texts apart: a part is a picture (None), or literals and piece numbers."""

    pieces: list[Piece]
    turns: list[tuple[str, list[list[str | int] | None]]]

    def first(self, num_turns: int) -> "Chat":
        pieces = [piece for piece in self.pieces if piece.turn < num_turns]
        return Chat(pieces, self.turns[:num_turns])


def one_message(role: str, text: str, num_images: int = 0) -> dict[str, Any]:
    """Make a message of parts, pictures first."""
    pictures = [{"type": "image"}] * num_images
    return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}


PROBE = [one_message("user", "x"), one_message("assistant", "xyz")]
SEEN = [one_message("user", "x", num_images=1), one_message("assistant", "xyz")]
LED = [one_message("system", "x"), *PROBE]


def read_chat(messages: Messages) -> Chat:
    """Set a chat's texts apart. Raises Unusable for a picture in an answer."""
    pieces: list[Piece] = []
    turns = []
    for turn, message in enumerate(messages):
        role, content = message["role"], message["content"]
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts: list[list[str | int] | None] = []
        if role == "assistant":
            if any(part["type"] != "text" for part in given):
                raise Unusable("an image inside an answer")
            answer = "".join(part["text"] for part in given)
            thought = THINKING.fullmatch(answer)
            if thought and thought[2] and thought[4]:
                parts = [[thought[1], len(pieces), thought[3], len(pieces) + 1]]
                pieces.append(Piece(turn, role, thought[2], is_reasoning=True))
                answer = thought[4]
            else:
                parts = [[len(pieces)]]
            pieces.append(Piece(turn, role, answer))
        else:
            for part in given:
                parts.append([len(pieces)] if part["type"] == "text" else None)
                if part["type"] == "text":
                    pieces.append(Piece(turn, role, part["text"]))
        turns.append((role, parts))
    return Chat(pieces, turns)


def marks_of(chat: Chat) -> list[str]:
    """Make a mark for each piece; a blank question stays: templates may leave it out."""
    return [
        f"{MARK}Mark{number}\ue001" if piece.text.strip() or piece.is_answer else piece.text
        for number, piece in enumerate(chat.pieces)
    ]


def locate(text: str, chat: Chat, marks: list[str]) -> dict[int, int]:
    """Return where each mark stands, by piece. Raises Unusable for one that is not there once.

    Earlier turns may lose their reasoning.
    """
    places = {}
    for number, (piece, mark) in enumerate(zip(chat.pieces, marks, strict=True)):
        count = text.count(mark) if mark.startswith(MARK) else 0
        if count == 1:
            places[number] = text.index(mark)
        elif count:
            raise Unusable(f"the template repeats {NAMES.get(piece.role, piece.role)}")
        elif mark.startswith(MARK):
            if not piece.is_reasoning or piece.turn == len(chat.turns) - 1:
                what = "the reasoning of " if piece.is_reasoning else ""
                name = NAMES.get(piece.role, piece.role)
                raise Unusable(f"the template drops or alters {what}{name}")
    return places


def as_written(content: str, behind: str, text: str, place: int) -> str | None:
    """Return a content as the template wrote it at `place`, before `behind`; None if it did not."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip(),
                 content.strip("\n"), content.lstrip("\n"), content.rstrip("\n")):  # fmt: skip
        if text.startswith(form + behind, place):
            return form
    return None
