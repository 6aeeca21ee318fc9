"""Reads samples from sources: each module knows one kind of input.

A module has one public function, `open_source(path, *, ...) -> Source`; its keyword arguments are
the options of data_tools.build that the format takes. A bad row is a SampleError with its own
reason and the build goes on; an input that cannot be read at all is a UserError.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from genrecal_ds.data.decode import SampleError

# LLaVA-1.5's instruction for benchmarks whose gold answers are a word or two.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class RawSample:
    """One conversation before it is written.

    images: (extension, encoded bytes) in the order of the messages' image parts. messages: HF
    chat format; `taught: False` on an answer that is context. answers: accepted final answers, for
    scoring. source_id: what the source calls it. read, unread, blank: keys of the item, for the
    build's closing table: read; not read; read, and holding "nan" or the like.
    """

    images: list[tuple[str, bytes]]
    messages: list[dict[str, Any]]
    kind: str
    answers: list[str] = field(default_factory=list)
    source_id: str = ""
    read: Sequence[str] = ()
    unread: Sequence[str] = ()
    blank: Sequence[str] = ()


class Evidence(NamedTuple):
    """A file that a verdict rests on, as it was; of a file that was not there, size is -1."""

    path: str
    size: int
    mtime_ns: int


class Picture(tuple[str, bytes]):
    """(extension, encoded bytes), and where they came from."""

    evidence: Evidence | None
    converted: str  # from this format; "" for the source's own bytes

    def __new__(
        cls, extension: str, data: bytes, evidence: Evidence | None = None, converted: str = ""
    ) -> "Picture":
        picture = super().__new__(cls, (extension, data))
        picture.evidence, picture.converted = evidence, converted
        return picture


class Rejected(SampleError):
    """A bad row, and what is known of it: its id, and the files that its verdict rests on."""

    def __init__(
        self, reason: str, detail: str, *, source_id: str = "", inputs: Iterable[Evidence] = ()
    ) -> None:
        super().__init__(reason, detail)
        self.source_id, self.inputs = source_id, tuple(inputs)


def with_id(error: SampleError, source_id: str) -> SampleError:
    """The error with an item's id, where it has none yet."""
    if not source_id or (isinstance(error, Rejected) and error.source_id):
        return error
    inputs = error.inputs if isinstance(error, Rejected) else ()
    return Rejected(error.reason, error.detail, source_id=source_id, inputs=inputs)


class Source(Protocol):
    """Rows in an order that never changes; any range of them can be read alone.

    Opened once, then read by several processes forked from that one: opening may be slow, rows
    hold no file open between calls.
    """

    name: str  # first part of every key: [a-z0-9][a-z0-9_-]*
    digest: str  # sha256 hex of what decides the rows; pictures are judged when they are read

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        """Exactly stop - start items, 0 <= start <= stop <= len."""
        ...


def user(text: str, num_images: int = 0) -> dict[str, Any]:
    """A user's turn with its pictures in front of the text."""
    return {"role": "user", "content": [*[{"type": "image"}] * num_images, _text(text)]}


def assistant(text: str) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": [_text(text)]}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class RowSource:
    """A Source whose rows are made one at a time; subclasses have name, digest, len and row."""

    def source_id(self, number: int) -> str:
        """What the source calls a row, whatever is wrong with it; "" where it has no name."""
        return ""

    def row(self, number: int) -> RawSample:
        """Raises SampleError."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        for number in range(start, stop):
            try:
                yield self.row(number)
            except SampleError as error:
                yield with_id(error, self.source_id(number))


@dataclass(frozen=True)
class Rows:
    """A source whose rows are already in memory."""

    name: str
    samples: Sequence[RawSample | SampleError]
    digest: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        return iter(self.samples[start:stop])
