"""Draws scenes of real handwritten digits (scikit-learn's load_digits) and asks about them.

A scene is a 2 x 2 grid of digit images. The source images, not the scenes, are divided into
train, validation and heldout: no handwriting is ever seen in two splits. Kinds of questions,
after the benchmarks they imitate:

    digit    a scene of one cell: which digit is it (teaches sight before anything else)
    place    VQAv2: which digit is where          largest  VQAv2: compare, with reasoning
    read     TextVQA: read the number of a row    row_sum, column_sum  OK-VQA: arithmetic
    box      RefCOCO+: where is the digit, as a box in pixels (not in DEFAULT_KINDS: the demo's
             teacher does not learn it in minutes)
    sum_text text only: no picture at all

wrong_share: this share of train's turns is taught another scene's answer to the same question.
Pictures, questions and `answers` stay the same, sample by sample.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_tools.sources import RawSample, assistant, user
from genrecal_ds.errors import UserError

VERSION = 2  # raise it whenever the same arguments would draw other scenes
CELL = 16  # pixels; a digit image is 8 x 8, enlarged to 14 with a jitter of one pixel
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
KINDS = ("digit", "place", "largest", "read", "row_sum", "column_sum", "box")
DEFAULT_KINDS = KINDS[1:-1]
TEXT_SHARE, TWO_TURN_SHARE = 0.03, 0.15
_SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "heldout": (0.85, 1.0)}


def open_source(
    path: str,
    *,
    split: str = "train",
    num_samples: int = 1000,
    seed: int = 0,
    kinds: str | None = None,
    wrong_share: float = 0.0,
) -> "Digits":
    """`path` must be the word digits: nothing is read. kinds: comma-separated."""
    if path != "digits":
        raise UserError(f"SOURCE {path!r}: --format digits draws its own; write `digits`")
    chosen = tuple(kinds.split(",")) if kinds else DEFAULT_KINDS
    return Digits(split, num_samples, seed, chosen, wrong_share)


class Asked(NamedTuple):
    """One turn: a question about a scene, and its answer."""

    question: str
    answer: str  # as taught
    final: str  # as scored


Draw = Callable[[np.random.Generator], Asked]  # a turn's question, asked of a scene drawn afresh


class Digits:
    """Scene number i depends on (split, seed, kinds, i) alone. Raises UserError for a bad option.

    heldout and validation have one turn and a picture each, so that a score has one meaning.
    """

    def __init__(
        self, split: str, num_samples: int, seed: int, kinds: tuple[str, ...] = DEFAULT_KINDS,
        wrong_share: float = 0.0,
    ) -> None:  # fmt: skip
        if split not in _SPLITS:
            raise UserError(f"--split {split}: digits has {', '.join(_SPLITS)}")
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise UserError(f"--kinds {','.join(unknown)}: digits has {', '.join(KINDS)}")
        if not 0 <= wrong_share < 1:
            raise UserError(f"--wrong-share {wrong_share}: write a share from 0 to below 1")
        if wrong_share and split != "train":
            raise UserError(f"--wrong-share: --split {split} is for scoring; leave it out")
        self.name = f"digits-{split}"
        self.split, self.num_samples, self.seed, self.kinds = split, num_samples, seed, kinds
        self.wrong_share = wrong_share
        self._pixels, self._labels, self._sources = load_split(split)
        arguments = f"{VERSION} {split} {num_samples} {seed} {kinds}"
        arguments += f" {wrong_share}" if wrong_share else ""
        self.digest = hashlib.sha256(arguments.encode() + self._pixels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.num_samples

    def rows(self, start: int, stop: int) -> Iterator[RawSample]:
        return map(self._row, range(start, stop))

    def _row(self, number: int) -> RawSample:
        entropy = [self.seed, list(_SPLITS).index(self.split), number]
        generator = np.random.default_rng(entropy)
        mixes = self.split == "train"
        if mixes and generator.random() < TEXT_SHARE:
            taught = self._taught([_sum_text(generator)], [_sum_text], entropy)
            messages = _messages(taught, has_picture=False)
            return RawSample([], messages, "sum_text", [taught[0].final], f"train-{number}")
        turns = 2 if mixes and generator.random() < TWO_TURN_SHARE else 1
        picked = [self.kinds[generator.integers(len(self.kinds))] for _ in range(turns)]
        if "digit" in picked:
            picked = ["digit"]
        side = 1 if picked == ["digit"] else 2
        chosen = generator.integers(len(self._labels), size=side * side)
        grid = self._labels[chosen].reshape(side, side)
        places = [_place(kind, grid, generator) for kind in picked]
        asked = [_ask(kind, grid, *place) for kind, place in zip(picked, places, strict=True)]
        draws = [self._draw(kind, grid, *place) for kind, place in zip(picked, places, strict=True)]
        identity = "-".join(str(self._sources[i]) for i in chosen)
        return RawSample(
            images=[("png", _scene(self._pixels[chosen], generator))],
            messages=_messages(self._taught(asked, draws, entropy)),
            kind=picked[-1],
            answers=[asked[-1].final],
            source_id=f"digits-{identity}",
        )

    def _draw(self, kind: str, grid: np.ndarray, row: int, column: int) -> Draw:
        """Return a function that asks the same of other digits, as many as in grid."""

        def draw(generator: np.random.Generator) -> Asked:
            if kind == "box":  # the digit of the question lies in another cell there
                return _ask(kind, grid, *generator.integers(len(grid), size=2))
            chosen = generator.integers(len(self._labels), size=grid.size)
            return _ask(kind, self._labels[chosen].reshape(grid.shape), row, column)

        return draw

    def _taught(self, asked: list[Asked], draws: list[Draw], entropy: list[int]) -> list[Asked]:
        """Return the turns; wrong_share of them have the answer of a scene that answers otherwise.

        A generator of its own decides, so that nothing else of a sample depends on wrong_share.
        """
        generator = np.random.default_rng([*entropy, 1])
        is_wrong = generator.random(len(asked)) < self.wrong_share
        taught = list(asked)
        for turn in np.flatnonzero(is_wrong):
            other = asked[turn]
            while other.final == asked[turn].final:
                other = draws[turn](generator)
            taught[turn] = asked[turn]._replace(answer=other.answer)
        return taught


def load_split(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels uint8 [n, 8, 8], labels [n], source numbers [n]) of the split's digit images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(20150618).permutation(len(data.target))
    first, last = (round(share * len(order)) for share in _SPLITS[split])
    chosen = order[first:last]
    pixels = np.clip(data.images[chosen] * 16, 0, 255).astype(np.uint8)
    return pixels, data.target[chosen], chosen


def _place(kind: str, grid: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Choose the (row, column) that is asked about; for box, a digit that occurs once, if any."""
    row, column = generator.integers(len(grid), size=2)
    unique = [p for p in np.ndindex(grid.shape) if (grid == grid[p]).sum() == 1]
    if kind == "box" and unique:
        row, column = unique[generator.integers(len(unique))]
    return row, column


def _ask(kind: str, grid: np.ndarray, row: int, column: int) -> Asked:
    digit = int(grid[row, column])
    if kind == "digit":
        return Asked("what digit is this ?", f"{digit}", f"{digit}")
    if kind == "place":
        return Asked(f"what digit is {ROWS[row]} {COLUMNS[column]} ?", f"{digit}", f"{digit}")
    if kind == "read":
        number = "".join(map(str, grid[row]))
        return Asked(f"what number is in the {ROWS[row]} row ?", number, number)
    if kind == "largest":
        shown, best = " ".join(map(str, grid.ravel())), str(grid.max())
        return Asked("which digit is the largest ?", f"of {shown} it is {best}", best)
    if kind == "box":
        box = f"{column * CELL} {row * CELL} {(column + 1) * CELL} {(row + 1) * CELL}"
        return Asked(f"where is the {digit} ?", box, box)
    line, name = (grid[row], ROWS[row]) if kind == "row_sum" else (grid[:, column], COLUMNS[column])
    word = "row" if kind == "row_sum" else "column"
    return _sum(f"what is the sum of the {name} {word} ?", *line)


def _sum(question: str, first: int, second: int) -> Asked:
    return Asked(question, f"{first} plus {second} is {first + second}", f"{first + second}")


def _sum_text(generator: np.random.Generator) -> Asked:
    first, second = generator.integers(10, size=2)
    return _sum(f"what is {first} plus {second} ?", first, second)


def _messages(asked: list[Asked], has_picture: bool = True) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn, (question, answer, _) in enumerate(asked):
        messages += [user(question, int(has_picture and turn == 0)), assistant(answer)]
    return messages


def _scene(digits: np.ndarray, generator: np.random.Generator) -> bytes:
    """A square grid of digits with jitter, contrast and a tinted background, as PNG."""
    side = round(len(digits) ** 0.5)
    canvas = np.zeros((side * CELL, side * CELL), np.float32)
    for position, digit in enumerate(digits):
        enlarged = np.asarray(Image.fromarray(digit).resize((14, 14), Image.Resampling.BILINEAR))
        top, left = generator.integers(0, 3, size=2)
        y, x = (CELL * index for index in divmod(position, side))
        canvas[y + top : y + top + 14, x + left : x + left + 14] = enlarged
    ink = generator.uniform(0.75, 1.0)
    paper = generator.uniform(0, 40, size=3)
    color = paper + canvas[..., None] / 255.0 * (255.0 * ink - paper)
    buffer = io.BytesIO()
    Image.fromarray(color.round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
