"""Finds an item's pictures, under whatever key and in whatever form, and says which is which.

The index of an image part, the path in it and the number in a mark decide; position decides only
where nothing else is said.
"""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from data_tools.sources import Picture
from data_tools.sources.conversations import Slot
from data_tools.sources.files import ImageRoot, with_extension
from data_tools.sources.keys import Seen, is_blank
from data_tools.sources.options import listed
from genrecal_ds.data.decode import MAX_IMAGE_BYTES, SampleError

PICTURE_KEYS = (
    "image", "images", "img", "imgs", "picture", "pictures", "jpg", "jpeg", "png", "webp",
)  # fmt: skip
# Keys that may name the picture which another key holds.
NAME_KEYS = (
    "image_path", "image_paths", "img_path", "img_paths", "image_file", "image_files",
    "image_url", "image_urls", "image_name", "image_names", "file_name", "file_names", "filename",
)  # fmt: skip
_LOOSE = ("image_name", "image_names", "file_name", "file_names", "filename")
NUMBERED = re.compile(r"(image|img|picture)_?(\d{1,3})")
_PICTURE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf])$", re.IGNORECASE)
MAX_BASE64_CHARS = MAX_IMAGE_BYTES * 4 // 3 + 1024
MIN_BASE64_CHARS = 64  # shorter: a file's name; no picture is that small
LOOKED_FOR = "image(s), img, picture(s), jpg, png, image_1, image_path(s), file_name, ..."


class PictureReader:
    """Reads one stored picture. Nothing is fetched; without a root no file is opened either."""

    def __init__(self, root: ImageRoot | None) -> None:
        self.root = root

    def read(self, value: Any) -> Picture:
        """Bytes, a name below the root, base64, a data: URI, or an object with one of these.

        Raises SampleError: image_path, image_missing, image_base64, image_bytes, image_format.
        """
        if isinstance(value, bytes | bytearray | memoryview):
            return with_extension(bytes(value))
        if isinstance(value, dict):
            return self._read_object(value)
        if not isinstance(value, str) or not value:
            raise SampleError("image_path", f"{value!r:.80} is not a picture")
        if value.startswith("data:"):
            head, _, body = value.partition(",")
            if not (head.startswith("data:image/") and head.endswith(";base64")):
                raise SampleError("image_base64", f"{head!r:.60} is not data:image/...;base64")
            return decode_base64(body)
        if value.startswith("file://"):
            value = unquote(value.removeprefix("file://"))
        if "://" in value[:16]:
            raise SampleError("image_path", f"{value!r:.80}: nothing is fetched from a URL")
        is_name = len(value) < MIN_BASE64_CHARS or "." in value
        if is_name or (self.root is not None and self.root.has(value)):
            if self.root is None:
                raise SampleError("image_missing", f"no bytes in the row (path {value!r:.120})")
            return self.root.read(value)
        return decode_base64(value)

    def _read_object(self, value: dict[str, Any]) -> Picture:
        if not is_blank(data := value.get("bytes")):
            return decode_base64(data) if isinstance(data, str) else self.read(data)
        for key in ("path", "url", "image", "image_url", "file_name", "image_path"):
            if not is_blank(value.get(key)):
                return self.read(value[key])
        raise SampleError("image_missing", f"no picture in an object of {sorted(value)!r:.80}")


def decode_base64(text: str) -> Picture:
    """The picture in a base64 text. Raises SampleError image_bytes, image_base64, ..."""
    if len(text) > MAX_BASE64_CHARS:
        raise SampleError("image_bytes", f"{len(text)} characters of base64")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("image_base64", f"{error}; and no file is named so") from error
    return with_extension(data)


@dataclass
class Pictures:
    """An item's pictures in its order; None where a list has a gap.

    names: what else each is called. numbers: from the number in `<image 2>` to the place.
    """

    values: list[Any] = field(default_factory=list)
    names: list[set[str]] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = self.names or [_names_in(value) for value in self.values]
        self.numbers = self.numbers or {n + 1: n for n in range(len(self.values))}

    @property
    def places(self) -> list[int]:
        """Where there is a picture."""
        return [place for place, value in enumerate(self.values) if value is not None]


def find_pictures(item: dict[str, Any], seen: Seen) -> Pictures:
    """All pictures under an item's keys. Raises SampleError image_count.

    Two keys may hold the same pictures, or one the names of the other's. Else it is unknown which
    are meant.
    """
    held: dict[str, Pictures] = {}
    numbered = {int(m[2]): key for key in item if (m := NUMBERED.fullmatch(key))}
    if numbered:
        order = sorted(numbered)
        values = [_values(item[numbered[number]], seen)[:1] or [None] for number in order]
        seen.read.update(dict.fromkeys(numbered.values()))
        pictures = Pictures([value for (value,) in values])
        pictures.numbers = {number: place for place, number in enumerate(order)}
        if pictures.places:
            held[", ".join(numbered[number] for number in order)] = pictures
    for key in PICTURE_KEYS:
        seen.read[key] = None
        if key in item and (found := Pictures(_values(item[key], seen))).places:
            held[key] = found
    named: dict[str, Pictures] = {}
    for key in NAME_KEYS:
        if key in item and (found := Pictures(_values(item[key], seen))).places:
            if key not in _LOOSE or all(_is_picture_name(v) for v in found.values if v):
                seen.read[key] = None
                named[key] = found
    if named and not held:
        held = {key: named.pop(key) for key in list(named)[:1]}
    if not held:
        return Pictures()
    (first, pictures), *others = held.items()
    for key, other in others:
        if other.values != pictures.values:
            raise SampleError("image_count", f"both {first} and {key} hold pictures")
    for key, other in named.items():
        _add_names(pictures, other, first, key)
    return pictures


def _values(stored: Any, seen: Seen) -> list[Any]:
    """The pictures of one key: one or a list, also a list in a text; what is blank is None."""
    stored = listed(stored)
    values = stored if isinstance(stored, list) else [stored]
    return [None if is_blank(value) else value for value in values]


def _add_names(pictures: Pictures, other: Pictures, first: str, key: str) -> None:
    """Take another key's values as names, after a check that they can be."""
    if len(other.values) != len(pictures.values):
        raise SampleError("image_count", f"{first} and {key} hold unlike numbers of pictures")
    for names, value in zip(pictures.names, other.values, strict=True):
        mine, theirs = {_base(name) for name in names}, {_base(name) for name in _names_in(value)}
        if mine and theirs and not mine & theirs and not str(value).startswith("http"):
            raise SampleError("image_count", f"{first} holds {mine}, and {key} {theirs}")
        names |= _names_in(value)


def _names_in(value: Any) -> set[str]:
    """What a stored picture is called, if it is called anything."""
    if isinstance(value, dict):
        found = (value.get(key) for key in ("path", "url", "image", "image_url", "file_name"))
        return {name for entry in found for name in _names_in(entry)}
    is_name = isinstance(value, str) and len(value) < 4096 and not value.startswith("data:")
    return {value} if is_name and (len(value) < MIN_BASE64_CHARS or "." in value) else set()


def _base(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]


def _is_picture_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_PICTURE_NAME.search(value))


def place_pictures(
    slots: Sequence[Slot], pictures: Pictures, read: Callable[[Any], Picture]
) -> list[Picture]:
    """The picture of every slot. Raises SampleError image_count, part_index, part_picture."""
    if all(slot.is_positional for slot in slots):
        places = pictures.places
        if len(places) != len(slots):
            where = "" if places else f"; looked under {LOOKED_FOR}"
            raise SampleError(
                "image_count", f"{len(slots)} <image> marks but {len(places)} images{where}"
            )
        return [read(pictures.values[place]) for place in places]
    if any(slot.is_positional for slot in slots):
        raise SampleError(
            "part_picture", "some image parts say which picture they show, and others do not"
        )
    if not pictures.places:
        if any(slot.value is None for slot in slots):
            raise SampleError(
                "image_count", f"{len(slots)} image parts but 0 images; looked under {LOOKED_FOR}"
            )
        return [read(slot.value) for slot in slots]
    places = [_place(slot, pictures) for slot in slots]
    for place in pictures.places:
        if not any(pictures.values[place] == pictures.values[used] for used in places):
            raise SampleError("image_count", f"no mark or part shows picture {place} of the item")
    known = {place: read(pictures.values[place]) for place in sorted(set(places))}
    return [known[place] for place in places]


def _place(slot: Slot, pictures: Pictures) -> int:
    """The place of a slot's picture in the item's list."""
    found = set()
    if slot.number is not None:
        found.add(pictures.numbers.get(slot.number, -1))
    if slot.index is not None:
        found.add(slot.index)
    if slot.value is not None:
        found.add(_by_name(slot, pictures))
    place = found.pop()
    if found or place not in pictures.places:
        said = {"number": slot.number, "index": slot.index, "value": slot.value}
        said = {key: value for key, value in said.items() if value is not None}
        raise SampleError(
            "part_index",
            f"turn {slot.turn}: {said!r:.120}, and the item has pictures {pictures.places}",
        )
    return place


def _by_name(slot: Slot, pictures: Pictures) -> int:
    wanted = _names_in(slot.value)
    same = [place for place in pictures.places if pictures.values[place] == slot.value]
    same = same or [place for place in pictures.places if wanted & pictures.names[place]]
    bases = {_base(name) for name in wanted}
    same = same or [
        place for place in pictures.places if bases & {_base(n) for n in pictures.names[place]}
    ]
    if not same or any(pictures.values[n] != pictures.values[same[0]] for n in same):
        expected = [sorted(pictures.names[place]) for place in pictures.places]
        raise SampleError(
            "part_picture",
            f"turn {slot.turn}: a part shows {slot.value!r:.80}, the item has {expected!r:.120}",
        )
    return same[0]
