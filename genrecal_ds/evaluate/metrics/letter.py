"""Scores AI2D, MMBench, MMMU and MathVista by the option's letter that an answer states."""

import re
from collections.abc import Sequence

# Of an answer that is no bare letter: "(B)", "B.", "B: text", "answer is B", "option B".
_ALONE = re.compile(r"^\(?([A-J])\)?[.:)]?$")
_LEADING = re.compile(r"^\(?([A-J])[.:)]\s")
_NAMED = re.compile(r"\b(?:answer|option|choice)\b\W*(?:is|:)?\W*\(?([A-J])\b(?!')")
_LAST = re.compile(r"(?<![\w'])\(?([A-J])\)?[.]?$")


def letter_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 or 0; an answer that names no letter is wrong."""
    return float(letter_of(prediction) in {answer.strip().upper() for answer in answers})


def letter_of(text: str) -> str | None:
    """Find the option that an answer names: alone, in front, as `the answer is B`, or last."""
    text = text.strip()
    if len(text) == 1 and text.upper() in "ABCDEFGHIJ":
        return text.upper()
    for pattern in (_ALONE, _LEADING):
        if match := pattern.search(text):
            return match[1]
    named = re.findall(_NAMED, re.sub(r"(?i)\b(answer|option|choice)\b", _lower, text))
    if named:
        return named[-1]
    last = _LAST.search(text)
    return last[1] if last else None


def _lower(match: re.Match) -> str:
    return match[0].lower()
