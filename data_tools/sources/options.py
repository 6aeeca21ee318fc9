"""Reads lettered options, as lists or as columns A to Z, and the answers that mean one of them."""

import ast
import json
import re
from string import ascii_uppercase
from typing import Any

from data_tools.sources.answers import LETTERS
from data_tools.sources.keys import Seen, cleaned, is_blank
from genrecal_ds.data.decode import SampleError

LIST_KEYS = ("choices", "options")
_LETTER = re.compile(r"\(?([A-Z])[).:]?")


def options_of(item: dict[str, Any], seen: Seen) -> list[str]:
    """The options in their order, up to the last that is not blank. Raises SampleError options.

    A gap is refused: closing it would give the later options other letters than the answer means.
    """
    found = {}
    for key in LIST_KEYS:
        seen.read[key] = None
        if not is_blank(item.get(key)):
            found[key] = _texts(key, _listed_options(key, item[key]), seen)
    if any(letter in item for letter in ascii_uppercase):
        letters = [letter for letter in ascii_uppercase if letter in item]
        seen.read.update(dict.fromkeys(letters))
        columns = [item.get(letter) for letter in ascii_uppercase]
        found["A to Z"] = _texts("A to Z", columns, seen)
    lists = [options for options in found.values() if options]
    if any(options != lists[0] for options in lists):
        raise SampleError("options", f"{' and '.join(found)} hold different options")
    return lists[0] if lists else []


def _listed_options(key: str, value: Any) -> list[Any]:
    """The values of a list, of a list in a text, or of an object with letters for keys."""
    value = listed(value)
    if isinstance(value, dict) and set(value) == {"text", "label"}:
        value = value["text"]
    if isinstance(value, dict):
        letters = list(ascii_uppercase[: len(value)])
        if sorted(value) != letters:
            raise SampleError("options", f"{key}: keys {sorted(map(str, value))!r:.60}")
        value = [value[letter] for letter in letters]
    if not isinstance(value, list):
        raise SampleError("options", f"{key}: {value!r:.80} is not a list")
    return value


def listed(value: Any) -> Any:
    """A list or an object that was stored as a text, as JSON or as Python writes it."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return parsed
    return value


def _texts(key: str, values: list[Any], seen: Seen) -> list[str]:
    if any(is_blank(value) and isinstance(value, str) and value.strip() for value in values):
        seen.blank[key] = None
    if any(isinstance(value, list | dict) for value in values):
        raise SampleError("options", f"{key}: {values!r:.80} are not texts")
    texts = ["" if is_blank(value) else cleaned(str(value)) for value in values]
    while texts and not texts[-1]:
        texts.pop()
    if len(texts) > len(LETTERS):
        raise SampleError("options", f"{key}: {len(texts)} options, and {len(LETTERS)} letters")
    if not all(texts):
        raise SampleError("options", f"option {LETTERS[texts.index('')]} is empty")
    return texts


def letter_of(answer: Any, options: list[str]) -> str:
    """The letter of the option that an answer means: a letter, an option's text, or a number.

    A number counts from 0, as data sets write it; a number in a text may count from 1 as well,
    and is refused unless it is an option. Raises SampleError answer.
    """
    letters = LETTERS[: len(options)]
    text = cleaned(str(answer))
    same = [letter for letter, option in zip(letters, options, strict=True) if option == text]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        if same and same != [letters[answer]]:
            raise SampleError("answer", f"{answer}: the place of an option, and another's text")
        return letters[answer]
    if (letter := _LETTER.fullmatch(text)) and letter[1] in letters:
        return letter[1]
    if len(same) == 1:
        return same[0]
    raise SampleError("answer", f"{answer!r:.80}: the options are {letters}, {options!r:.80}")
