"""Reads CSV and TSV, VLMEvalKit's too: question, answer, pictures as paths or base64.

One pass finds where the records begin, because a field may hold line breaks. A record is parsed
again when it is read.
"""

import base64
import binascii
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sources import RawSample, RowSource
from data_tools.sources.answers import LETTERS, with_options
from data_tools.sources.conversations import to_messages
from data_tools.sources.files import ImageRoot, digest_files, with_extension
from genrecal_ds.data.decode import MAX_IMAGE_BYTES, SampleError
from genrecal_ds.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_FIELD_CHARS = MAX_IMAGE_BYTES * 4 // 3 + 1024
MIN_BASE64_CHARS = 64  # shorter: a file's name; no picture is that small


def open_source(path: str, *, images: str | None = None) -> "Table":
    """path: a .csv or .tsv in UTF-8 with a header. images: root of the paths in column image.

    Columns: question; answer, or answers as a JSON list; optional image (a path, base64 or a
    data: URI), id or index, kind or category, hint, and options A, B, C, ... whose answer is a
    letter. Raises UserError for another header.
    """
    return Table(Path(path), images)


class Table(RowSource):
    """Rows are the file's records, in its order."""

    name = "table"

    def __init__(self, path: Path, images: str | None) -> None:
        if path.suffix.lower() not in DELIMITERS or not path.is_file():
            raise UserError(f"{path}: no such .csv or .tsv file")
        self.path, self.delimiter = path, DELIMITERS[path.suffix.lower()]
        self.digest = digest_files([path])
        self.images = ImageRoot(images or path.parent)
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
        if "question" not in columns or not {"answer", "answers"} & set(columns):
            raise UserError(f"{self.path}: needs columns question and answer, has {header}")
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise UserError(f"{self.path}: columns {twice} come twice; rename one of each")
        return columns

    def row(self, number: int) -> RawSample:
        start, end = map(int, self._offsets[number : number + 2])
        with _long_fields():
            lines = _Lines(self.path, start, end)
            record = next(csv.reader(lines, delimiter=self.delimiter, strict=True))
        if len(record) != len(self.columns):
            raise SampleError("columns", f"{len(record)} fields, the header has {self.columns}")
        row = dict(zip(self.columns, record, strict=True))
        question, answers = _question(row), _answers(row)
        picture = row.get("image", "").strip()
        images = [self._image(picture)] if picture else []
        return RawSample(
            images=images,
            messages=to_messages({"question": question, "answers": answers}, len(images)),
            kind=row.get("kind") or row.get("category") or self.name,
            answers=answers,
            source_id=row.get("id") or row.get("index") or "",
        )

    def _image(self, value: str) -> tuple[str, bytes]:
        if value.startswith("data:"):
            head, _, body = value.partition(",")
            if not (head.startswith("data:image/") and head.endswith(";base64")):
                raise SampleError("image_base64", f"{head!r:.60} is not data:image/...;base64")
            return _decoded(body)
        if "://" in value[:16]:
            raise SampleError("image_path", f"{value!r:.80}: nothing is fetched from a URL")
        suffix = value[-5:].lower()
        is_name = len(value) < MIN_BASE64_CHARS or "." in suffix
        return self.images.read(value) if is_name else _decoded(value)


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


def _decoded(text: str) -> tuple[str, bytes]:
    if len(text) > MAX_FIELD_CHARS:
        raise SampleError("image_bytes", f"{len(text)} characters of base64")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("image_base64", str(error)) from error
    return with_extension(data)


def _question(row: dict[str, str]) -> str:
    """Return the question with hint and options. Raises SampleError question, options."""
    question = row["question"].strip()
    if not question:
        raise SampleError("question", "the question is empty")
    if hint := row.get("hint", "").strip():
        question = f"{hint}\n{question}"
    options = _options(row)
    if not all(options):
        # closing the gap would give the later options other letters than the answer means
        raise SampleError("options", f"option {LETTERS[options.index('')]} is empty")
    return with_options(question, options) if options else question


def _options(row: dict[str, str]) -> list[str]:
    """Return the options A, B, C, ... up to the last one that is not empty."""
    options = [row.get(letter, "").strip() for letter in LETTERS]
    while options and not options[-1]:
        options.pop()
    return options


def _answers(row: dict[str, str]) -> list[str]:
    if listed := row.get("answers", "").strip():
        try:
            answers: Any = json.loads(listed)
        except (ValueError, RecursionError) as error:
            raise SampleError("answer", f"answers is not a JSON list: {error}") from error
    else:
        answers = [row.get("answer", "").strip()]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        raise SampleError("answer", f"{answers!r:.80}")
    letters = LETTERS[: len(_options(row))]
    if letters and not all(answer in letters for answer in answers):
        raise SampleError("answer", f"{answers!r:.80}: the options are {letters}")
    return answers
