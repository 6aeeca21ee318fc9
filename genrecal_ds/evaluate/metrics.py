"""Scores of generated answers, and how sure they are."""

import math
import re
import unicodedata
from collections.abc import Sequence

from genrecal_ds.errors import UserError

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A word of any script, with its decimals or apostrophes; a minus only where a number begins.
_WORD = re.compile(r"(?:(?<!\w)-(?=\d))?[^\W_]+(?:\.\d+|'[^\W_]+)*")


def normalize(text: str) -> list[str]:
    """Lower-case words of any script without punctuation; 1,234 is one number, -3 is not 3."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return _WORD.findall(_THOUSANDS.sub("", text))


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction ends with an accepted answer, word by word.

    A prediction may be reasoned ("3 plus 8 is 11"): what it ends with is the answer given.
    All words of an accepted answer count: "bottom left" is not "top left".
    """
    words = normalize(prediction)
    accepted = [normalize(answer) for answer in answers]
    return any(answer and words[-len(answer) :] == answer for answer in accepted)


def box_iou(prediction: str, answers: Sequence[str]) -> float:
    """Best intersection over union of the first four numbers (x0 y0 x1 y1); 0 without four.

    Raises UserError when an accepted answer is no box.
    """
    boxes = [_box(answer) for answer in answers]
    for answer, box in zip(answers, boxes, strict=True):
        if len(box) < 4:
            raise UserError(f"box answer {answer!r}: write four numbers, x0 y0 x1 y1")
    numbers = _box(prediction)
    return max((_iou(numbers, box) for box in boxes), default=0.0) if len(numbers) == 4 else 0.0


def _box(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)[:4]]


def _iou(first: list[float], second: list[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (first, second)]
    union = sum(areas) - overlap
    return overlap / union if union > 0 else 0.0


def is_correct(kind: str, prediction: str, answers: Sequence[str]) -> bool:
    """RefCOCO's rule (IoU >= 0.5) for boxes, exact match for everything else."""
    if kind == "box":
        return box_iou(prediction, answers) >= 0.5
    return exact_match(prediction, answers)


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion; (0, 1) of nothing. Wilson 1927."""
    if total == 0:
        return 0.0, 1.0
    share, squared = correct / total, z * z
    center = (share + squared / (2 * total)) / (1 + squared / total)
    spread = z * math.sqrt(share * (1 - share) / total + squared / (4 * total**2))
    half = spread / (1 + squared / total)
    return max(0.0, center - half), min(1.0, center + half)


def score(outcomes: Sequence[bool]) -> dict[str, float | int]:
    """{"score", "n", "low", "high"} of single outcomes, as shares of 1."""
    low, high = wilson(sum(outcomes), len(outcomes))
    mean = sum(outcomes) / len(outcomes) if outcomes else 0.0
    return {"score": mean, "n": len(outcomes), "low": low, "high": high}


def scores_by_kind(kinds: Sequence[str], outcomes: Sequence[bool]) -> dict[str, dict]:
    """`overall` first, then every kind of question."""
    result = {"overall": score(outcomes)}
    for kind in sorted(set(kinds)):
        result[kind] = score([o for k, o in zip(kinds, outcomes, strict=True) if k == kind])
    return result
