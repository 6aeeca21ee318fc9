"""Scores ChartQA: a number may be 5 % off the gold one, any other text must be equal."""

from collections.abc import Sequence

WITHIN = 0.05


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 or 0. A percentage is a hundredth; against a gold of 0 numbers are compared as text."""
    return float(any(_is_close(prediction.strip(), answer.strip()) for answer in answers))


def _is_close(given: str, gold: str) -> bool:
    number, expected = _number(given), _number(gold)
    if number is not None and expected:
        return abs(number - expected) / abs(expected) <= WITHIN
    return given.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
