"""Scenes of real handwritten digits (scikit-learn's load_digits) with questions about them.

A scene is a 2 x 2 grid of digit images. The source images, not the scenes, are divided into
train, validation and heldout: no handwriting is ever seen in two splits. Kinds of questions,
after the benchmarks they imitate:

    digit    a scene of one cell: which digit is it (teaches sight before anything else)
    place    VQAv2: which digit is where          largest  VQAv2: compare, with reasoning
    read     TextVQA: read the number of a row    row_sum, column_sum  OK-VQA: arithmetic
    box      RefCOCO+: where is the digit, as a box in pixels (not in DEFAULT_KINDS: the demo's
             teacher does not learn it in minutes)
    sum_text text only: no picture at all
"""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_tools.sources import RawSample
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
) -> "Digits":
    """`path` must be the word digits: nothing is read. kinds: comma-separated."""
    if path != "digits":
        raise UserError(f"SOURCE {path!r}: --format digits draws its own; write `digits`")
    return Digits(split, num_samples, seed, tuple(kinds.split(",")) if kinds else DEFAULT_KINDS)


class Digits:
    """Scene number i depends on (split, seed, kinds, i) alone. Raises UserError for a bad name.

    heldout and validation have one turn and a picture each, so that a score has one meaning.
    """

    def __init__(
        self, split: str, num_samples: int, seed: int, kinds: tuple[str, ...] = DEFAULT_KINDS
    ) -> None:
        if split not in _SPLITS:
            raise UserError(f"--split {split}: digits has {', '.join(_SPLITS)}")
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise UserError(f"--kinds {','.join(unknown)}: digits has {', '.join(KINDS)}")
        self.name = f"digits-{split}"
        self.split, self.num_samples, self.seed, self.kinds = split, num_samples, seed, kinds
        self._pixels, self._labels, self._sources = load_split(split)
        arguments = f"{VERSION} {split} {num_samples} {seed} {kinds}"
        self.digest = hashlib.sha256(arguments.encode() + self._pixels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.num_samples

    def rows(self, start: int, stop: int) -> Iterator[RawSample]:
        return map(self._row, range(start, stop))

    def _row(self, number: int) -> RawSample:
        generator = np.random.default_rng([self.seed, list(_SPLITS).index(self.split), number])
        mixes = self.split == "train"
        if mixes and generator.random() < TEXT_SHARE:
            return _text_only(generator, f"{self.split}-{number}")
        turns = 2 if mixes and generator.random() < TWO_TURN_SHARE else 1
        picked = [self.kinds[generator.integers(len(self.kinds))] for _ in range(turns)]
        if "digit" in picked:
            picked = ["digit"]
        side = 1 if picked == ["digit"] else 2
        chosen = generator.integers(len(self._labels), size=side * side)
        grid = self._labels[chosen].reshape(side, side)
        asked = [_ask(kind, grid, generator) for kind in picked]
        identity = "-".join(str(self._sources[i]) for i in chosen)
        return RawSample(
            images=[("png", _scene(self._pixels[chosen], generator))],
            messages=_messages(asked),
            kind=picked[-1],
            answers=[asked[-1][2]],
            source_id=f"digits-{identity}",
        )


def load_split(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels uint8 [n, 8, 8], labels [n], source numbers [n]) of the split's digit images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(20150618).permutation(len(data.target))
    first, last = (round(share * len(order)) for share in _SPLITS[split])
    chosen = order[first:last]
    pixels = np.clip(data.images[chosen] * 16, 0, 255).astype(np.uint8)
    return pixels, data.target[chosen], chosen


def _ask(kind: str, grid: np.ndarray, generator: np.random.Generator) -> tuple[str, str, str]:
    """(question, answer as taught, final answer as scored)."""
    row, column = generator.integers(len(grid), size=2)
    digit = int(grid[row, column])
    if kind == "digit":
        return "what digit is this ?", f"{digit}", f"{digit}"
    if kind == "place":
        return f"what digit is {ROWS[row]} {COLUMNS[column]} ?", f"{digit}", f"{digit}"
    if kind == "read":
        number = "".join(map(str, grid[row]))
        return f"what number is in the {ROWS[row]} row ?", number, number
    if kind == "largest":
        shown, best = " ".join(map(str, grid.ravel())), str(grid.max())
        return "which digit is the largest ?", f"of {shown} it is {best}", best
    if kind == "box":
        unique = [p for p in np.ndindex(2, 2) if (grid == grid[p]).sum() == 1]
        if unique:
            row, column = unique[generator.integers(len(unique))]
        box = f"{column * CELL} {row * CELL} {(column + 1) * CELL} {(row + 1) * CELL}"
        return f"where is the {int(grid[row, column])} ?", box, box
    line, name = (grid[row], ROWS[row]) if kind == "row_sum" else (grid[:, column], COLUMNS[column])
    word = "row" if kind == "row_sum" else "column"
    total = f"{line.sum()}"
    return (
        f"what is the sum of the {name} {word} ?", f"{line[0]} plus {line[1]} is {total}", total,
    )  # fmt: skip


def _messages(asked: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn, (question, answer, _) in enumerate(asked):
        picture = [{"type": "image"}] if turn == 0 else []
        content = [*picture, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _text_only(generator: np.random.Generator, identity: str) -> RawSample:
    first, second = generator.integers(10, size=2)
    total = str(first + second)
    asked = (f"what is {first} plus {second} ?", f"{first} plus {second} is {total}", total)
    messages = _messages([asked])
    messages[0]["content"] = messages[0]["content"][1:]
    return RawSample([], messages, "sum_text", [total], identity)


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
