"""LLaVA and ShareGPT annotations: a JSON array or JSON lines of conversations, beside pictures.

Only the places of the rows are kept, and each row is parsed when it is read: a million
conversations need megabytes, not gigabytes. An array's text is held while it is scanned, once.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sources import RawSample, RowSource
from data_tools.sources.conversations import id_of, kind_of, scored_answers, to_messages
from data_tools.sources.files import ImageRoot, digest_files
from genrecal_ds.data.decode import SampleError, parse_json
from genrecal_ds.errors import UserError

MAX_ROW_BYTES = 2**24
_SPACE_OR_COMMA = re.compile(r"[\s,]*")


def open_source(path: str, *, images: str | None = None) -> "Llava":
    """path: a .json or .jsonl file. images: the pictures' root; default the file's folder.

    Raises UserError for an unreadable file, and for an array that is not JSON.
    """
    return Llava(Path(path), images)


class Llava(RowSource):
    """Rows are the items of the file, in its order."""

    name = "llava"

    def __init__(self, path: Path, images: str | None) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; name a .json or .jsonl of conversations")
        self.path = path
        self.images = ImageRoot(images or path.parent)
        self.digest = digest_files([path])
        spans = _line_spans(path) if path.suffix == ".jsonl" else _array_spans(path)
        self._spans = np.array(list(spans), np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def row(self, number: int) -> RawSample:
        start, end = map(int, self._spans[number])
        if end - start > MAX_ROW_BYTES:
            raise SampleError("record_bytes", f"{end - start} bytes, limit {MAX_ROW_BYTES}")
        with self.path.open("rb") as file:
            file.seek(start)
            item = parse_json(file.read(end - start))
        if not isinstance(item, dict):
            raise SampleError("row", f"{item!r:.80} is not an object")
        pictures = [self.images.read(name) for name in _names(item)]
        return RawSample(
            images=pictures,
            messages=to_messages(item, len(pictures)),
            kind=kind_of(item, "llava"),
            answers=scored_answers(item),
            source_id=id_of(item),
        )


def _names(item: dict[str, Any]) -> list[Any]:
    value = item.get("image", item.get("images"))
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _line_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the lines that are not blank."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if offset == 0 and line.startswith(b"\xef\xbb\xbf"):
                raise UserError(f"{path}: starts with a byte order mark; save it as plain UTF-8")
            if line.strip():
                yield offset, offset + len(line)
            offset += len(line)


def _array_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Byte spans of the items of a JSON array.

    The json scanner finds where an item ends, and what it parsed is dropped at once. Positions
    are characters for it; the running byte offset is kept beside them.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert it") from None
    opening = re.match(r"\s*\[", text)
    if opening is None:
        start = "a byte order mark" if text.startswith("\ufeff") else repr(text[:20])
        raise UserError(f"{path}: starts with {start}, not with [; one item a line is .jsonl")
    scan = json.JSONDecoder().raw_decode
    position, offset = opening.end(), len(text[: opening.end()].encode())
    while True:
        gap = _SPACE_OR_COMMA.match(text, position)
        assert gap is not None, "the pattern matches the empty string"
        position, offset = gap.end(), offset + len(gap[0])  # blanks and commas are one byte each
        if text.startswith("]", position):
            return
        try:
            _, end = scan(text, position)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, position) + 1
            raise UserError(f"{path}: the item at line {line} is not JSON ({error})") from None
        length = len(text[position:end].encode())
        yield offset, offset + length
        position, offset = end, offset + length
