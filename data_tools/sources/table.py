"""Reads CSV and TSV, VLMEvalKit's too: question, answer, pictures as paths or base64.

One pass finds where the records begin, because a field may hold line breaks. A record is parsed
again when it is read.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sources import RawSample, RowSource
from data_tools.sources.files import ImageRoot, digest_files
from data_tools.sources.items import TEACHING_KEYS, Items, named
from data_tools.sources.keys import is_blank
from data_tools.sources.pictures import MAX_BASE64_CHARS, MIN_BASE64_CHARS, PictureReader
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_FIELD_CHARS = 8 * MAX_BASE64_CHARS  # a field may hold a list of pictures


def open_source(
    path: str, *, images: str | None = None, ignore: Sequence[str] = (), links: str | None = None
) -> "Table":
    """path: a .csv or .tsv in UTF-8 with a header. images: root of the paths in column image.

    Columns: question; answer, or answers as a JSON list; optional pictures (paths, base64, data:
    URIs, or lists of them), id or index, kind or category, hint, and options: A, B, C, ... or a
    list. ignore: columns to leave out. links: see ImageRoot. Raises UserError for another header.
    """
    return Table(Path(path), images, ignore, links)


class Table(RowSource):
    """Rows are the file's records, in its order."""

    name = "table"

    def __init__(
        self, path: Path, images: str | None, ignore: Sequence[str], links: str | None
    ) -> None:
        if path.suffix.lower() not in DELIMITERS or not path.is_file():
            raise UserError(f"{path}: no such .csv or .tsv file")
        self.path, self.delimiter = path, DELIMITERS[path.suffix.lower()]
        self.digest = digest_files([path])
        root = ImageRoot(images or path.parent, links)
        self._root = root
        self._items = Items(self.name, str(path), PictureReader(root), ignore)
        self._rows_by_index: dict[str, int] | None = None
        with _long_fields():
            starts = self._starts()
        self._offsets = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _starts(self) -> list[int]:
        """Byte offset of each record behind the header, and of the end."""
        lines = _Lines(self.path, 0, None)
        # strict: a quote that is never closed would swallow the rest of the file as one answer
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        try:
            self.columns = self._checked_header(next(reader, []))
            starts = [lines.offset]
            for record in reader:
                if record:
                    starts.append(lines.offset)
                else:
                    starts[-1] = lines.offset  # a blank line belongs to nothing
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: byte {lines.offset}: {error}; save as UTF-8") from None
        except csv.Error as error:
            place = f"the record that ends at line {reader.line_num}"
            raise UserError(f"{self.path}: {place}: {error}; mend its quotes") from None
        return starts

    def _checked_header(self, header: list[str]) -> list[str]:
        columns = [name.strip() for name in header]
        is_question = "question" in columns and {"answer", "answers"} & set(columns)
        if not is_question and not (TEACHING_KEYS - {"question"}) & set(columns):
            raise UserError(f"{self.path}: needs columns question and answer, has {header}")
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise UserError(f"{self.path}: columns {twice} come twice; rename one of each")
        return columns

    def row(self, number: int) -> RawSample:
        item = self._record(number)
        kind = item.get("kind") or item.pop("category", "") or self.name
        identity = item.get("id") or item.get("index") or ""
        with named(identity):
            if "question" in item or not (TEACHING_KEYS & item.keys()):
                item["question"] = _question(item)
                item["answers" if "answers" in item else "answer"] = _answers(item)
            if isinstance(picture := item.get("image"), str):
                item["image"] = self._image(picture.strip())
        own = {"id": identity, "kind": kind, "source": None, "data_source": None}
        return self._items.sample({**item, **own})

    def _record(self, number: int) -> dict[str, Any]:
        """The fields of a row that are not empty."""
        start, end = map(int, self._offsets[number : number + 2])
        with _long_fields():
            lines = _Lines(self.path, start, end)
            record = next(csv.reader(lines, delimiter=self.delimiter, strict=True))
        if len(record) != len(self.columns):
            raise SampleError("columns", f"{len(record)} fields, the header has {self.columns}")
        fields = zip(self.columns, record, strict=True)
        return {name: value for name, value in fields if value.strip()}

    def _image(self, value: str) -> str:
        """The picture of a field; VLMEvalKit writes the index of the row that holds it."""
        if not (value.isdigit() and len(value) < MIN_BASE64_CHARS and "index" in self.columns):
            return value
        if self._root.has(value):
            return value
        if self._rows_by_index is None:
            found = enumerate(self._record(number).get("index") for number in range(len(self)))
            self._rows_by_index = {index: number for number, index in found if index}
        if value not in self._rows_by_index:
            raise SampleError("image_missing", f"image {value!r}: no row of that index")
        other = self._record(self._rows_by_index[value]).get("image", "")
        if len(other) < MIN_BASE64_CHARS and "." not in other:
            raise SampleError("image_missing", f"image {value!r}: the row of that index has none")
        return str(other)


class _Lines:
    """Gives the decoded lines of a byte range, and counts how far they have been read."""

    def __init__(self, path: Path, start: int, end: int | None) -> None:
        self.path, self.offset, self.end = path, start, end

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                is_first = self.offset == 0
                self.offset += len(line)
                # spreadsheets write a byte order mark
                yield line.decode("utf-8-sig" if is_first else "utf-8")
                if self.end is not None and self.offset >= self.end:
                    return


@contextmanager
def _long_fields() -> Iterator[None]:
    """Raise csv's limit of 128 KiB a field, which a picture exceeds, for the whole process."""
    before = csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _question(item: dict[str, Any]) -> str:
    question = str(item.get("question", "")).strip()
    if is_blank(question):
        raise SampleError("question", "the question is empty")
    return question


def _answers(item: dict[str, Any]) -> list[str]:
    """The answers of a row, of which the first is taught. Raises SampleError answer."""
    if listed := item.get("answers"):
        try:
            answers: Any = json.loads(listed)
        except (ValueError, RecursionError) as error:
            raise SampleError("answer", f"answers is not a JSON list: {error}") from error
    else:
        answers = [item.get("answer", "").strip()]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) and not is_blank(answer) for answer in answers)
    ):
        raise SampleError("answer", f"{answers!r:.80}")
    return answers
