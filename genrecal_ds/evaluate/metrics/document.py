"""Scores DocVQA by ANLS: how near an answer is to the nearest gold one, by letters.

The similarity is 1 - edits / longer length, for the best gold answer. Below one half it counts as
0. At exactly one half the paper has 0. The evaluators in use have .5, and so do we.
"""

from collections.abc import Sequence

LEAST = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1; letters' case and blanks do not matter."""
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= LEAST else 0.0


def _similarity(first: str, second: str) -> float:
    # The length is that of the texts as they are: the evaluators in use have it so.
    longest = max(len(first.upper()), len(second.upper()))
    edits = levenshtein(_plain(first), _plain(second))
    return 1.0 - edits / longest if longest else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(first: str, second: str) -> int:
    """Count the insertions, deletions and substitutions that turn one into the other."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(
                min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b))
            )  # fmt: skip
        previous = current
    return previous[-1]
