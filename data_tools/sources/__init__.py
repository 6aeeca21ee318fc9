"""Sources of samples: each module reads one kind of input and yields RawSample."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RawSample:
    """One conversation before it is written.

    images: (extension, encoded bytes) in the order of the messages' image parts. messages: HF
    chat format. answers: accepted final answers, for scoring.
    """

    images: list[tuple[str, bytes]]
    messages: list[dict[str, Any]]
    kind: str
    answers: list[str] = field(default_factory=list)
    source_id: str = ""
