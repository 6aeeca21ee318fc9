"""Scores VQAv2, OK-VQA and TextVQA by how many of ten people gave the same answer.

Each of the ten people is left out in turn, and the answer counts min(1, equal answers among the
other nine / 3). The score is the mean of the ten. Two variants are in use and must not be mixed:

    official    answers are normalised only where the ten are not all equal: "Yes" against ten "yes"
                is wrong (the evaluation code that came with VQA)
    always      both sides are always normalised (the evaluation server, lmms-eval, most papers)
"""

import re
from collections.abc import Sequence

# One that is attached to a word goes, one that stands between two becomes a blank.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
# The original means "not behind a digit", and its (?!<=\d) says "not before the text <=": every
# point goes that no digit follows. At most 32 of them, since a flag stands where a count belongs.
_POINT = re.compile(r"\.(?!\d)")
_MOST_POINTS = 32
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# What a word is with its apostrophes; without one of them, or without any, it is read as this.
# Those that would then be other words (hell, well, ill, were, its, lets, shell) are not in it.
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll
that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's
won't would've wouldn't y'all you'd you'll you're you've
""".split()
_WITH_TWO = """
couldn't've hadn't've he'd've it'd've mightn't've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've who'd've wouldn't've you'd've y'all'll
""".split()


def _contractions() -> dict[str, str]:
    contractions = {word.replace("'", ""): word for word in _WITH_APOSTROPHE}
    for word in _WITH_TWO:
        first, second = word.index("'"), word.rindex("'")
        for place in (first, second):
            contractions[word[:place] + word[place + 1 :]] = word
    # Not by these rules, but in the original's list.
    contractions |= {"shed've": "she'd've", "she'dve": "she'd've", "wed've": "we'd've",
              "we'dve": "we'd've", "somebody'd": "somebodyd", "y'alld've": "y'all'd've",
              "yall'd've": "y'all'd've", "y'all'dve": "y'all'd've",
              "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}  # fmt: skip
    return contractions


_CONTRACTIONS = _contractions()


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "always") -> float:
    """0 to 1. variant: `always` or `official`, see above."""
    given = _one_line(prediction)
    people = [_one_line(answer) for answer in answers]
    if variant == "always" or len(set(people)) > 1:
        given, people = normalize(given), [normalize(answer) for answer in people]
    equal = [answer == given for answer in people]
    total = sum(equal)
    shares = [min(1.0, (total - own) / 3) for own in equal]
    return sum(shares) / len(shares)


def normalize(text: str) -> str:
    """Remove punctuation and articles, turn number words into digits, restore contractions."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    words = [word for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    has_comma, out = _COMMA.search(text) is not None, text
    for mark in _PUNCTUATION:
        is_attached = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if is_attached or has_comma else " ")
    return _POINT.sub("", out, count=_MOST_POINTS)
