"""Renders chats by a model's own template, and says where each answer starts in the text.

Nothing is known of a template but what it writes. It renders each form of chat (roles, pictures)
once with a mark in place of every text. What stands between the marks is the template's own. The
text of a chat must then be the same with its texts in place of the marks, outer blanks apart: so a
template that drops, alters or repeats a question or an answer is found out, in every sample.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from genrecal_ds.data.pair import Messages, Unusable, is_taught
from genrecal_ds.errors import UserError
from genrecal_ds.models.marked_chat import (
    LED,
    MARK,
    NAMES,
    PROBE,
    SEEN,
    Chat,
    as_written,
    locate,
    marks_of,
    one_message,
    read_chat,
)
from genrecal_ds.models.template_files import DATES, TODAY, with_fixed_date

Content = Literal["string", "parts"]  # how a template reads message.content
KEPT_FORMS = 4096


class Rendered(NamedTuple):
    """A chat as text. starts: the character at which each taught answer starts."""

    text: str
    starts: tuple[int, ...]


class _Form(NamedTuple):
    """What a template writes around the texts of every chat of one form."""

    order: list[int]  # the pieces, as the template orders them
    between: list[str]  # before the first, between them, behind the last
    leads: dict[int, int]  # by an answer's first piece: characters of the answer before it
    is_rewritten: bool  # an earlier turn is written otherwise when it is the last


class ChatTemplate:
    """One model's template. Raises UserError for one that no chat can be taught by."""

    def __init__(
        self, folder: Path, source: str, variables: dict[str, str], image_token: str | None,
        special_tokens: Iterable[str], stops: Iterable[str], eos_token: str | None,
    ):  # fmt: skip
        """variables: what templates read, such as bos_token. stops: tokens that end generation.
        eos_token: the one to append to an answer where the template ends a turn with none.
        """
        self.folder, self.source = folder, source
        self.variables, self.image_token = variables, image_token
        self._dated, self._dates = with_fixed_date(source)
        self._special, self._stops = _any_of(special_tokens), _any_of(stops)
        self._forms: dict[str, _Form | str] = {}  # or why there is none
        self.appended = ""  # behind every answer
        self.content: dict[str, Content] = {}  # by role
        try:
            self._find_content()
            self._find_end(eos_token)
            self.render(PROBE)
        except Unusable as error:
            raise UserError(
                f"{folder}: no chat can be taught by its chat template ({error}); take the "
                "template of the model's release"
            ) from None

    def render(self, messages: Messages, last_turn: bool = False) -> Rendered:
        """Render a chat that ends with an answer. Raises Unusable with a reason.

        last_turn: teach the last turn alone; earlier turns may be rewritten.
        """
        chat = read_chat(messages)
        taught = {turn for turn, message in enumerate(messages) if is_taught(message)}
        form = self._form(chat)
        if form.is_rewritten and not last_turn:
            raise Unusable("the template rewrites earlier turns")
        text = self._write(chat, [piece.text for piece in chat.pieces])
        place, whole, starts = len(form.between[0]), form.between[0], []
        if not text.startswith(whole):
            raise Unusable("the template writes a text by its words")
        for number, behind in zip(form.order, form.between[1:], strict=True):
            piece = chat.pieces[number]
            written = as_written(piece.text, behind, text, place)
            if written is None:
                raise Unusable(f"the template alters {NAMES.get(piece.role, piece.role)}")
            if number in form.leads and piece.turn in taught:
                starts.append(len(whole) - form.leads[number])
            whole += written + (self.appended if piece.is_answer else "") + behind
            place += len(written + behind)
        if place != len(text):
            raise Unusable("the template writes a text by its words")
        if not starts:
            raise Unusable("no answer is taught")
        return Rendered(whole, tuple(starts[-1:] if last_turn else starts))

    def prompt(self, messages: Messages) -> str:
        """Render a chat up to where its next answer starts. Raises Unusable with a reason."""
        text, (start,) = self.render([*messages, one_message("assistant", "x")], last_turn=True)
        return text[:start]

    def rewrites(self, messages: Messages) -> bool:
        """Whether an earlier turn is written otherwise when it is the last, so that each turn needs
        a text of its own. Raises Unusable with a reason."""
        return self._form(read_chat(messages)).is_rewritten

    def described(self) -> Iterator[str]:
        """Say what was found out about the template, a line each."""
        yield f"contents as {self.content['user']}, answers as {self.content['assistant']}"
        if self.appended:
            yield f"the template ends no turn: {self.appended} is put behind every answer"
        if self._dates:
            yield f"the template writes a date: always {TODAY}"
        try:
            if self.rewrites([*PROBE, *PROBE]):
                yield "the template rewrites earlier turns: each turn is a sequence of its own"
        except Unusable as error:
            yield f"several turns cannot be used: {error}"

    def _find_content(self) -> None:
        """Find out by rendering whether contents are strings or lists of parts, for each role."""
        kinds: tuple[Content, ...] = ("string", "parts")
        if self.image_token:  # templates that know pictures read parts, and some strings as well
            kinds = ("parts", "string")
        reason = None
        for user, assistant in ((a, b) for a in kinds for b in dict.fromkeys((a, *kinds))):
            self.content = {"user": user, "assistant": assistant, "system": user}
            failed = self._fails(PROBE) or (self.image_token and self._fails(SEEN))
            if not failed:
                break
            reason = reason or failed
        else:
            raise Unusable(reason)
        for system in dict.fromkeys((user, *kinds)):
            self.content["system"] = system
            if not self._fails(LED):
                return
        self.content["system"] = user  # it takes no system prompt

    def _fails(self, messages: Messages) -> str | None:
        """Return why the template cannot write a chat, if it cannot."""
        chat = read_chat(messages)
        try:
            text = self._write(chat, marks := marks_of(chat))
            locate(text, chat, marks)
        except Unusable as error:
            return str(error)
        if re.search(r"""['"](type|text)['"]\s*:""", text):
            return "the template prints the parts of a message"
        images = sum(part is None for _, parts in chat.turns for part in parts)
        if self.image_token and text.count(self.image_token) < images:
            return "the template drops a picture"
        return None

    def _find_end(self, eos_token: str | None) -> None:
        """Find out whether the template ends a turn with a stop token; if not, append one."""
        chat = read_chat(PROBE)
        marks = marks_of(chat)
        behind = self._write(chat, marks).partition(marks[-1])[2]
        if self._stops.search(behind):
            return
        if special := self._special.search(behind):
            raise UserError(
                f"{self.folder}: its chat template ends an answer with {special[0]}, and "
                "generation would not stop there; add its id to eos_token_id in "
                "generation_config.json"
            )
        if not eos_token:
            raise UserError(
                f"{self.folder}: its chat template writes no end-of-turn after an answer, and its "
                "tokenizer has no eos_token to append; set it in tokenizer_config.json"
            )
        self.appended = eos_token

    def _form(self, chat: Chat) -> _Form:
        """Return what the template writes around such a chat. Raises Unusable with a reason."""
        if chat.turns[-1][0] != "assistant":
            raise Unusable("the last message is not the assistant's")
        marks = marks_of(chat)
        key = json.dumps(self._shaped(chat, marks))
        if key not in self._forms:
            try:
                form: _Form | str = self._make_form(chat, marks)
            except Unusable as error:
                form = str(error)
            if len(self._forms) >= KEPT_FORMS:
                self._forms.clear()
            self._forms[key] = form
        if isinstance(form := self._forms[key], str):
            raise Unusable(form)
        return form

    def _make_form(self, chat: Chat, marks: list[str]) -> _Form:
        marked = self._write(chat, marks)
        places = locate(marked, chat, marks)
        order = sorted(places, key=places.__getitem__)
        answered = [number for number in order if chat.pieces[number].role == "assistant"]
        if answered != sorted(answered):
            raise Unusable("the template moves an answer")
        ends = [0, *(places[number] + len(marks[number]) for number in order)]
        begins = [*(places[number] for number in order), len(marked)]
        between = [marked[a:b] for a, b in zip(ends, begins, strict=True)]
        is_rewritten = len(order) < sum(mark[:1] == MARK for mark in marks)
        for count, number in enumerate(order, 1):
            if chat.pieces[number].is_answer:
                is_rewritten |= self._is_rewritten(chat, number, order[:count], between)
        leads = {
            number: self._lead(chat, marks, number, marked[: places[number]])
            for number in answered
            if not (number and chat.pieces[number - 1].is_reasoning)
        }
        return _Form(order, between, leads, is_rewritten)

    def _is_rewritten(self, chat: Chat, number: int, order: list[int], between: list[str]) -> bool:
        """Whether an answer and all before it differ from what is written when it is the last."""
        count = len(order)
        num_turns = chat.pieces[number].turn + 1
        end = self._end(between[count])
        if num_turns == len(chat.turns):
            if end is None:
                raise Unusable("an answer without end-of-turn token")
            return False
        own = self._form(chat.first(num_turns))
        own_end = self._end(own.between[-1])
        was = [*own.between[:-1], own.between[-1][:own_end]]
        return end is None or own.order != order or was != [*between[:count], between[count][:end]]

    def _end(self, behind: str) -> int | None:
        """Return where a turn ends in the text behind its answer; None if it does not.

        Raises Unusable where words stand in front of its end: no one taught has said them.
        """
        if self.appended:
            return 0
        stop = self._stops.search(behind)
        if stop is None:
            return None
        if words := self._special.sub("", behind[: stop.start()]).strip():
            raise Unusable(f"the template writes {words[:20]!r} behind an answer")
        return stop.end()

    def _lead(self, chat: Chat, marks: list[str], number: int, before: str) -> int:
        """Count the characters in front of an answer's first piece that are the answer's.

        An answer starts where generation starts. But words that the template puts between, such as
        an empty block of reasoning, belong to the prompt; a block with reasoning to the answer.
        """
        piece = chat.pieces[number]
        if piece.is_reasoning:
            return len(before) - max(before.rfind("<think>"), 0)
        try:
            prompt = self._write(chat.first(piece.turn), marks, add_generation_prompt=True)
        except Unusable:  # some refuse a chat without a question
            return 0
        blanks = before.removeprefix(prompt)
        is_prompt = before.startswith(prompt) and not blanks.strip()
        return len(blanks) if is_prompt else 0

    def _shaped(self, chat: Chat, texts: list[str]) -> list[dict[str, Any]]:
        """Make what the template reads: the chat with `texts` for its pieces."""
        shaped = []
        for role, parts in chat.turns:
            filled = [
                None
                if part is None
                else "".join(s if isinstance(s, str) else texts[s] for s in part)
                for part in parts
            ]
            content: Any
            if self.content.get(role, self.content["user"]) == "string":
                # Where a string has a picture, a line of its own holds it, by custom.
                picture = f"{self.image_token}\n"
                content = "".join(picture if text is None else text for text in filled)
            else:
                content = [
                    {"type": "image"} if text is None else {"type": "text", "text": text}
                    for text in filled
                ]
            shaped.append({"role": role, "content": content})
        return shaped

    def _write(self, chat: Chat, texts: list[str], add_generation_prompt: bool = False) -> str:
        try:
            (text,), _ = render_jinja_template(
                [self._shaped(chat, texts)], chat_template=self._dated,
                add_generation_prompt=add_generation_prompt, **{DATES: self._dates},
                **self.variables,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise Unusable(f"the template refuses the chat: {reason}") from None
        return text


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
