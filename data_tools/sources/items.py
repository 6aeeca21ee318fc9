"""Turns one item of a JSON file, a table or a shard into a sample, whatever its keys are called.

What people's data looks like is known here once, for all formats that hold other people's items.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from data_tools.sources import Picture, RawSample, Rejected, assistant
from data_tools.sources.answers import with_options
from data_tools.sources.conversations import (
    MARK,
    NUMBERED_MARK,
    TURN_KEYS,
    TURN_PARTS,
    VALUE_KEYS,
    Turns,
    has_numbered_marks,
    is_invisible,
    question_turns,
    read_turns,
    up_to_last_taught,
    with_system,
)
from data_tools.sources.files import field_of
from data_tools.sources.keys import Seen, is_blank
from data_tools.sources.options import LIST_KEYS, letter_of, options_of
from data_tools.sources.pictures import (
    NAME_KEYS,
    NUMBERED,
    PICTURE_KEYS,
    PictureReader,
    Pictures,
    find_pictures,
    place_pictures,
)
from genrecal_ds.data.decode import SampleError

CAPTION_QUESTION = "Describe the image."
TEACHING_KEYS = frozenset({*TURN_KEYS, "question", "caption"})
READ_KEYS = frozenset({
    *TEACHING_KEYS, *LIST_KEYS, "answer", "answers", "hint", "context", "system", "system_prompt",
    "id", "data_source", "source", "kind",
})  # fmt: skip
_IDS = ("id", "index", "uid", "idx", "question_id", "key")


def is_read(key: str) -> bool:
    """Whether a key means something wherever it stands, so that leaving it out changes samples."""
    name = key.rpartition(".")[2]
    is_picture = name in (*PICTURE_KEYS, *NAME_KEYS) or NUMBERED.fullmatch(name) is not None
    is_turns = key.startswith(("turn.", "part.")) and name in (*TURN_PARTS, *VALUE_KEYS)
    return is_turns or is_picture or key in READ_KEYS or re.fullmatch("[A-Z]|txt", key) is not None


class Items:
    """Reads items of one file. place names it in errors; ignored are the keys of --ignore."""

    def __init__(
        self, name: str, place: str, reader: PictureReader, ignored: Sequence[str] = ()
    ) -> None:
        self.name, self.place, self.reader, self.ignored = name, place, reader, ignored

    def sample(
        self,
        item: Any,
        *,
        members: Sequence[tuple[str, Picture]] | None = None,
        unread: Sequence[str] = (),
        default_id: str = "",
    ) -> RawSample:
        """One sample. members: pictures that come beside the item, with their names.

        unread: keys that were not even loaded. Raises Rejected, or UserError for an unread key
        that holds content.
        """
        if not isinstance(item, dict):
            raise SampleError("row", f"{item!r:.80} is not an object")
        read: list[Picture] = []
        identity = next((str(item[key]) for key in _IDS if not is_blank(item.get(key))), default_id)
        with named(identity, read):
            seen = Seen(self.ignored)
            kept = seen.kept(item)
            refuse_films(kept)
            turns, pictures = self._turns_and_pictures(kept, members, seen)
            turns = with_system(turns, self._system(kept, seen))
            answers = self._scored(kept, seen)
            seen.leave(kept)
            where = f"{self.place}: item {identity!r:.80}" if identity else self.place
            seen.require_no_content(where, turns.shown)

            def read_one(value: Any) -> Picture:
                picture = value if isinstance(value, Picture) else self.reader.read(value)
                read.append(picture)
                return picture

            images = place_pictures(turns.slots, pictures, read_one)
            turns, num_left = up_to_last_taught(turns)
            if num_left:
                images = images[: len(turns.slots)]
                seen.unread["turns behind the last taught one"] = None
            return RawSample(
                images=list(images),
                messages=turns.messages,
                kind=kind_of(kept, self.name),
                answers=answers,
                source_id=id_of(kept) or default_id,
                read=[key for key in seen.read if not is_blank(kept.get(key))],
                unread=[*seen.unread, *unread],
                blank=list(seen.blank),
            )

    def _turns_and_pictures(
        self, item: dict[str, Any], members: Sequence[tuple[str, Picture]] | None, seen: Seen
    ) -> tuple[Turns, Pictures]:
        pictures = find_pictures(item, seen)
        if members is not None:
            pictures = in_named_order(members, pictures)
        turns = self._turns(item, MARK, seen)
        if pictures.places and not turns.slots:
            if has_numbered_marks(turns.messages):
                turns = self._turns(item, NUMBERED_MARK, seen)
            elif not any(key in item for key in TURN_KEYS[:3]):
                # a question, a caption, FineVision: texts without marks, all pictures in front
                turns = _pictures_in_front(turns, pictures)
        return turns, pictures

    def _turns(self, item: dict[str, Any], mark: re.Pattern[str], seen: Seen) -> Turns:
        keys = [key for key in TURN_KEYS if not is_blank(item.get(key))]
        found = [read_turns(item, key, mark, seen) for key in keys]
        if any(turns.messages != found[0].messages for turns in found[1:]):
            raise SampleError("conversations", f"{' and '.join(keys)} hold different turns")
        if found:
            return found[0]
        if "question" in item:
            return self._question(item, mark, seen)
        if not is_blank(item.get("caption")):
            caption = seen.text({"caption": field_of(item, "caption", str)}, "caption")
            turns = question_turns(CAPTION_QUESTION, mark)
            return turns._replace(messages=[*turns.messages, assistant(caption)])
        named_keys = ", ".join(sorted(str(key) for key in item))
        raise SampleError(
            "conversations", f"neither conversations nor messages nor question in {named_keys:.120}"
        )

    def _question(self, item: dict[str, Any], mark: re.Pattern[str], seen: Seen) -> Turns:
        """A question behind its context and hint, with its options; then the first answer."""
        question = field_of(item, "question", str)
        seen.read["question"] = None
        context = [text for key in ("context", "hint") if (text := seen.text(item, key))]
        options = options_of(item, seen)
        if context or options:
            question = "\n".join([*context, question.strip()])
        text = with_options(question, options) if options else question
        turns = question_turns(text if mark.search(text) else text.strip(), mark)
        answers = self._answers(item, options, seen)
        return turns._replace(messages=[*turns.messages, assistant(answers[0])])

    def _answers(self, item: dict[str, Any], options: list[str], seen: Seen) -> list[str]:
        """The accepted answers, of which the first is taught; of options their letters."""
        seen.read.update({"answer": None, "answers": None})
        answers = answers_of(item)
        if options:
            return [letter_of(answer, options) for answer in answers]
        texts = [str(answer) for answer in answers]
        if is_invisible(texts[0]):
            raise SampleError("answer", f"answers: {texts!r:.80}")
        return texts

    def _scored(self, item: dict[str, Any], seen: Seen) -> list[str]:
        """Answers for scoring: a conversation may have none."""
        seen.read.update({"answer": None, "answers": None})
        if not (item.get("answers") or item.get("answer") is not None):
            return []
        if any(not is_blank(item.get(key)) for key in TURN_KEYS) or "question" not in item:
            return [str(answer) for answer in answers_of(item)]
        return self._answers(item, options_of(item, seen), seen)

    def _system(self, item: dict[str, Any], seen: Seen) -> str:
        seen.read.update({"system": None, "system_prompt": None})
        keys = [key for key in ("system", "system_prompt") if not is_blank(item.get(key))]
        texts = {field_of(item, key, str) for key in keys}
        if len(texts) > 1:
            raise SampleError("system", "system and system_prompt hold different texts")
        return texts.pop() if texts else ""


@contextmanager
def named(identity: str, read: Sequence[Picture] = ()) -> Iterator[None]:
    """Give a rejection the item's id, and the picture files that were read for it."""
    try:
        yield
    except SampleError as error:
        inputs = [picture.evidence for picture in read if picture.evidence]
        inputs += error.inputs if isinstance(error, Rejected) else ()
        raise Rejected(error.reason, error.detail, source_id=identity, inputs=inputs) from error


def refuse_films(item: dict[str, Any]) -> None:
    """Raise SampleError for an item with a film or a sound."""
    for key in ("video", "videos", "audio", "audios"):
        if item.get(key) and not is_blank(item[key]):
            raise SampleError("video", f"{key} items are not supported")


def in_named_order(members: Sequence[tuple[str, Picture]], stated: Pictures) -> Pictures:
    """Members in the order in which an item names them; as they are where it names none of them."""
    pictures = Pictures([picture for _, picture in members], [{name} for name, _ in members])
    names = [names for place, names in enumerate(stated.names) if place in stated.places]
    if not members:
        return stated
    if any(not own for own in names):
        raise SampleError("image_count", "pictures in the json, and others beside it")
    names = [own for own in names if not all(name.startswith("http") for name in own)]
    if not names:
        return pictures
    order = [[n for n, (name, _) in enumerate(members) if is_named(name, own)] for own in names]
    if not any(order) and len(names) == len(members):
        for own, more in zip(pictures.names, names, strict=True):
            own |= more
        return pictures
    places = [place for found in order for place in found]
    if sorted(places) != list(range(len(members))) or any(len(found) != 1 for found in order):
        raise SampleError(
            "image_count",
            f"the json names {[sorted(own) for own in names]!r:.120}, and the shard holds "
            f"{[name for name, _ in members]!r:.120}",
        )
    values = [members[place][1] for place in places]
    return Pictures(values, [own | {members[p][0]} for own, p in zip(names, places, strict=True)])


def is_named(member: str, names: set[str]) -> bool:
    """Whether one of the names means a member: its whole name, its last part, or its extension."""
    base = member.rpartition("/")[2]
    return bool({member, base, base.partition(".")[2]} & {re.split(r"[/\\]", n)[-1] for n in names})


def _pictures_in_front(turns: Turns, pictures: Pictures) -> Turns:
    """All pictures before the first question."""
    first = next((n for n, m in enumerate(turns.messages) if m["role"] == "user"), None)
    if first is None:
        return turns
    marked = question_turns("<image>" * len(pictures.places), MARK)
    message = turns.messages[first]
    parts = [part for part in marked.messages[0]["content"] if part["type"] == "image"]
    message["content"] = [*parts, *message["content"]]
    return Turns(turns.messages, [replace(slot, turn=first) for slot in marked.slots])


def answers_of(item: dict[str, Any]) -> list[Any]:
    """The accepted answers of an item: `answers`, else `answer`. Raises SampleError answer."""
    answers = item.get("answers") or item.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(_is_answer(answer) for answer in answers):
        raise SampleError("answer", f"answers: {answers!r:.80}")
    return answers


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
