"""Checks and formats what benchmarks share: questions, human answers, lettered options."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from data_tools.sources.files import field_of
from data_tools.sources.keys import METADATA
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

LETTERS = ascii_uppercase
CHOOSE_LETTER = "Answer with the option's letter from the given choices directly."


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave; of equals the first."""
    return Counter(answers).most_common(1)[0][0]


def question_of(row: Any) -> str:
    """The stripped question of an annotation. Raises SampleError question."""
    question = field_of(row, "question", str).strip()
    if not question:
        raise SampleError("question", "the question is empty")
    return question


def strings_of(row: Any, key: str) -> list[str]:
    """A non-empty list of strings, as it is. Raises SampleError answer."""
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise SampleError("answer", f"{key}: {values!r:.80}")
    if not any(value.strip() for value in values):
        raise SampleError("answer", f"{key}: all empty")
    return values


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, its options as lines `A. text`, and the instruction to answer a letter."""
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, CHOOSE_LETTER])


def keys_of(read: str, *rows: Mapping[str, Any]) -> dict[str, list[str]]:
    """RawSample's `read` and `unread` for the rows of a benchmark; `read` names keys in a text."""
    keys = dict.fromkeys(key for row in rows for key in row)
    names = read.split()
    return {
        "read": [key for key in keys if key in names],
        "unread": [key for key in keys if key not in names and key not in METADATA],
    }


def id_in(row: Any, *keys: str) -> str:
    """An annotation's own id, of one key or several; "" where the row is no object."""
    return "-".join(str(row.get(key, "")) for key in keys) if isinstance(row, dict) else ""


def require_split(split: str, splits: Sequence[str], name: str) -> None:
    if split not in splits:
        raise UserError(f"--split {split}: {name} has {', '.join(splits)}")


def require_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: missing; SOURCE is the folder that holds {what}")
    return path
