"""Knows the keys of people's items: which are read, which say nothing, which must not be lost.

Every key of an item is read, known to be metadata, or counted by name. An unread key that looks
like content (a picture, an option, a turn, a system prompt, a loss flag) ends the build unless
--ignore names it: silence would teach something else than the data says.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from genrecal_ds.errors import UserError

# Facts about an item that teach nothing; not even counted.
METADATA = frozenset({
    "id", "idx", "index", "uid", "uuid", "source", "data_source", "dataset", "kind", "category",
    "split", "url", "license", "width", "height", "size", "language",
})  # fmt: skip
_CONTENT = re.compile(
    r"image|img|pict|photo|thumb|(^|_)pics?(_|$)|jpe?g|png|webp|frame|video|audio|speech"
    r"|choice|option|candidate|distractor|^[A-Z]$"
    r"|conversation|message|dialog|(^|_)turns?(_|$)|(^|_)chat|(^|_)texts?$|question|answer|prompt"
    r"|response|instruction|query|caption|(^|_)(in|out)puts?$|(^|_)tools$|reasoning|rationale"
    r"|system|hint|context|passage|lecture|solution|explanation"
    r"|loss|weight|mask|train"
)
# Facts about content, such as image_id or question_type.
_FACT = re.compile(
    r"(^|_)(id|ids|idx|index|type|types|size|sizes|shape|width|height|source|sources|split|hash"
    r"|md5|sha\d*|license|url|urls|num|number|count|lang|language|score|scores|quality|format"
    r"|length|len|tokens|date|time|model|category|topic|level|ratio|similarity)$"
    r"|^(num|n|len|count|has|is)_"
)
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
_ENDS = re.compile(rf"^[\s{_INVISIBLE}]+|[\s{_INVISIBLE}]+$")
_NOTHING = ("", "nan", "NaN", "<NA>")


def cleaned(text: str) -> str:
    """A text without blanks, byte order marks and zero-width marks around it."""
    return _ENDS.sub("", text)


def is_blank(value: Any) -> bool:
    """Whether a value stands for nothing: null, NaN, "nan", invisible text, or only such values."""
    if isinstance(value, str):
        return len(value) < 64 and cleaned(value) in _NOTHING or not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, list):
        return all(map(is_blank, value))
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    return value is None


def is_content(key: str) -> bool:
    """Whether an unread key looks like something to be taught or shown."""
    key = key.rpartition(".")[2]
    lower = key if len(key) == 1 else key.lower()
    return bool(_CONTENT.search(lower)) and not _FACT.search(lower)


class Seen:
    """Keeps account of one item's keys. Keys of a turn are named `turn.KEY`, of a part `part.KEY`.

    ignored: keys that the user gave up.
    """

    def __init__(self, ignored: Sequence[str] = ()) -> None:
        self.ignored = frozenset(ignored)
        self.read: dict[str, None] = {}
        self.unread: dict[str, Any] = {}
        self.blank: dict[str, None] = {}

    def kept(self, item: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """The item without null values and ignored keys."""
        for key in item.keys() & {name.removeprefix(prefix) for name in self.ignored}:
            if prefix + key in self.ignored and not is_blank(item[key]):
                self.unread[prefix + key] = None
        return {
            key: value
            for key, value in item.items()
            if value is not None and prefix + key not in self.ignored
        }

    def text(self, item: dict[str, Any], key: str) -> str:
        """The text of an optional key, cleaned; "" and counted where it stands for nothing."""
        value = item.get(key)
        self.read[key] = None
        if is_blank(value):
            if value:
                self.blank[key] = None
            return ""
        text = str(value).strip()
        if text != cleaned(text):
            self.blank[key] = None
        return cleaned(text)

    def leave(self, item: dict[str, Any], prefix: str = "") -> None:
        """Count the keys of an item that nobody read."""
        for key, value in item.items():
            name = prefix + str(key)
            if name not in self.read and str(key) not in METADATA and not is_blank(value):
                self.unread[name] = value

    def require_no_content(self, place: str, shown: str) -> None:
        """Raise UserError for an unread key that holds content which the texts do not show."""
        lost = {
            key: value for key, value in self.unread.items() if not _is_shown(key, value, shown)
        }
        for key, value in lost.items():
            options = " ".join(f"--ignore {name}" for name in lost)
            raise UserError(
                f"{place}: key {key!r} looks like content and is not read ({value!r:.60}); give it "
                f"a name of docs/data.md, or leave it out with {options}"
            )


def _is_shown(key: str, value: Any, shown: str) -> bool:
    """Whether an unread key holds no content, or only such as the texts show anyway."""
    if value is None or not is_content(key):
        return True
    texts = list(_strings(value))
    return bool(texts) and all(text in shown for text in texts)


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts in a value; a number or a flag can be found in no text."""
    if isinstance(value, str):
        if not is_blank(value):
            yield cleaned(value)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif value is not None:
        yield "\0"  # in no text of a sample
