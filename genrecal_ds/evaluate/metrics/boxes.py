"""Scores RefCOCO's boxes: right where intersection over union is 0.5 or more.

Gold boxes are x0 y0 x1 y1, from 0 to 1. Models write their boxes in conventions of their own:

    unit    0 to 1, as ours          thousandths    0 to 1000, as Qwen and InternVL do
"""

import re
from collections.abc import Sequence

from genrecal_ds.errors import UserError

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_IN_BRACKETS = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([f"({_NUMBER.pattern})"] * 4) + r"\s*[\])]")
CONVENTIONS = {"unit": 1.0, "thousandths": 1000.0}


def box_accuracy(prediction: str, answers: Sequence[str], convention: str = "unit") -> float:
    """1 or 0, as RefCOCO counts; a prediction without four numbers is wrong."""
    return float(box_iou(prediction, answers, CONVENTIONS[convention]) >= 0.5)


def box_iou(prediction: str, answers: Sequence[str], scale: float = 1.0) -> float:
    """Return the best intersection over union of the first four numbers; 0 without four.

    scale: what the prediction calls 1. Raises UserError when an accepted answer is no box.
    """
    boxes = [_box(answer) for answer in answers]
    for answer, box in zip(answers, boxes, strict=True):
        if len(box) < 4:
            raise UserError(f"box answer {answer!r}: write four numbers, x0 y0 x1 y1")
    numbers = [number / scale for number in _box(prediction)]
    return max((_iou(numbers, box) for box in boxes), default=0.0) if len(numbers) == 4 else 0.0


def _box(text: str) -> list[float]:
    """Read the first four numbers in brackets, else the first four numbers of the text."""
    match = _IN_BRACKETS.search(text)
    numbers = match.groups() if match else _NUMBER.findall(text)[:4]
    return [float(number) for number in numbers]


def _iou(first: list[float], second: list[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (first, second)]
    union = sum(areas) - overlap
    return overlap / union if union > 0 else 0.0
