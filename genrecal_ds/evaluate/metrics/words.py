"""Scores free answers of known wording: the last words must be an accepted answer."""

import re
import unicodedata
from collections.abc import Sequence

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A word of any script, with its decimals or apostrophes; a minus only where a number begins.
_WORD = re.compile(r"(?:(?<!\w)-(?=\d))?[^\W_]+(?:\.\d+|'[^\W_]+)*")


def normalize(text: str) -> list[str]:
    """Lower-case words of any script without punctuation; 1,234 is one number, -3 is not 3."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return _WORD.findall(_THOUSANDS.sub("", text))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction ends with an accepted answer, word by word.

    A prediction may be reasoned ("3 plus 8 is 11"): what it ends with is the answer given.
    All words of an accepted answer count: "bottom left" is not "top left".
    """
    words = normalize(prediction)
    accepted = [normalize(answer) for answer in answers]
    return float(any(answer and words[-len(answer) :] == answer for answer in accepted))
