"""Reads samples from sources: each module knows one kind of input.

A module has one public function, `open_source(path, *, ...) -> Source`; its keyword arguments are
the options of data_tools.build that the format takes. A bad row is a SampleError with its own
reason and the build goes on; an input that cannot be read at all is a UserError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from genrecal_ds.data.decode import SampleError

# LLaVA-1.5's instruction for benchmarks whose gold answers are a word or two.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class RawSample:
    """One conversation before it is written.

    images: (extension, encoded bytes) in the order of the messages' image parts. messages: HF
    chat format. answers: accepted final answers, for scoring. source_id: what the source calls it.
    """

    images: list[tuple[str, bytes]]
    messages: list[dict[str, Any]]
    kind: str
    answers: list[str] = field(default_factory=list)
    source_id: str = ""


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

    def row(self, number: int) -> RawSample:
        """Raises SampleError."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        for number in range(start, stop):
            try:
                yield self.row(number)
            except SampleError as error:
                yield error


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
