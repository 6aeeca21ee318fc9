"""Reads LLaVA and ShareGPT conversations from a JSON array or JSON lines, beside pictures.

Only the places of the rows are kept, and each row is parsed when it is read. So a million
conversations need megabytes, not gigabytes. An array's text is held once, while it is scanned.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data_tools.sources import RawSample, RowSource
from data_tools.sources.files import ImageRoot, digest_files
from data_tools.sources.items import Items
from data_tools.sources.pictures import PictureReader
from genrecal_ds.data.decode import SampleError, parse_json
from genrecal_ds.errors import UserError

MAX_ROW_BYTES = 2**24
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's; \s has more, of several bytes each


def open_source(
    path: str, *, images: str | None = None, ignore: Sequence[str] = (), links: str | None = None
) -> "Llava":
    """path: a .json or .jsonl file. images: the pictures' root; default the file's folder.

    ignore: keys to leave out. links: see ImageRoot. Raises UserError for an unreadable file, and
    for an array that is not JSON.
    """
    return Llava(Path(path), images, ignore, links)


class Llava(RowSource):
    """Rows are the items of the file, in its order."""

    name = "llava"

    def __init__(
        self, path: Path, images: str | None, ignore: Sequence[str], links: str | None
    ) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; name a .json or .jsonl of conversations")
        self.path = path
        reader = PictureReader(ImageRoot(images or path.parent, links))
        self._items = Items(self.name, str(path), reader, ignore)
        self.digest = digest_files([path])
        spans = _line_spans(path) if path.suffix == ".jsonl" else _array_spans(path)
        self._spans = np.fromiter(chain.from_iterable(spans), np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def row(self, number: int) -> RawSample:
        start, end = map(int, self._spans[number])
        if end - start > MAX_ROW_BYTES:
            raise SampleError("record_bytes", f"{end - start} bytes, limit {MAX_ROW_BYTES}")
        with self.path.open("rb") as file:
            file.seek(start)
            return self._items.sample(parse_json(file.read(end - start), allow_nan=True))


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

    The json scanner finds where an item ends, and the parsed item is dropped at once. The scanner
    counts characters; a running byte offset is kept beside its positions.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert it") from None
    start = _after_space(text, 0)
    if not text.startswith("[", start):
        beginning = "a byte order mark" if text.startswith("\ufeff") else repr(text[:20])
        raise UserError(f"{path}: starts with {beginning}, not with [; one item a line is .jsonl")
    scan = json.JSONDecoder().raw_decode
    position = offset = _after_space(text, start + 1)  # only one-byte characters so far
    if text.startswith("]", position):
        _require_end(path, text, position + 1)
        return
    while True:
        try:
            _, end = scan(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, text, position, str(error)) from None
        length = len(text[position:end].encode())
        yield offset, offset + length
        comma = _after_space(text, end)
        if text.startswith("]", comma):
            _require_end(path, text, comma + 1)
            return
        if not text.startswith(",", comma):
            raise _not_json(path, text, comma, "no comma or ] behind an item")
        position = _after_space(text, comma + 1)
        offset += length + position - end  # blanks and the comma are one byte each


def _after_space(text: str, position: int) -> int:
    gap = _SPACE.match(text, position)
    assert gap is not None, "the pattern matches the empty string"
    return gap.end()


def _require_end(path: Path, text: str, position: int) -> None:
    """Refuse text behind the array: else the second of two joined files would be lost."""
    position = _after_space(text, position)
    if position != len(text):
        raise _not_json(path, text, position, "something follows the array")


def _not_json(path: Path, text: str, position: int, what: str) -> UserError:
    line = text.count("\n", 0, position) + 1
    return UserError(f"{path}: the item at line {line} is not JSON ({what}); mend the file")
