"""What byte matching costs: megabytes of text a second on one core; and what the next-byte KL does
through a head that trains, gradients included, beside the head's three products alone.

    python -m benchmarks.byte_matching [--rounds 7] [--out FILE]

Text is random letters; both sides split it into pieces of 1 to 8 bytes, each in its own way.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.race import Contestants, device_facts, race, spread
from genrecal_ds.data.byte_matching import match_bytes
from genrecal_ds.models.token_bytes import byte_vocabulary
from genrecal_ds.ops.head_loss import Head
from genrecal_ds.ops.linear_cross_entropy import linear_cross_entropy
from genrecal_ds.ops.linear_distance import linear_distance
from genrecal_ds.ops.next_byte import Boundaries, next_byte_kl, next_byte_log_mass
from genrecal_ds.recipe.kinds import KINDS

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
MEGABYTE = 10**6
LETTERS = b"etaoinshrdlucmfwypvbgkjqxz"
VOCABULARY, WIDTH, ROWS = (150_000, 3584, 2048) if ON_CUDA else (50_000, 1024, 512)


def split(text: bytes, draw: random.Random) -> list[bytes | None]:
    pieces: list[bytes | None] = []
    start = 0
    while start < len(text):
        end = start + draw.randint(1, 8)
        pieces.append(text[start:end])
        start = end
    return [*pieces, None]


def matching_race(length: int, rounds: int) -> dict:
    """Of answers of so many bytes; on the CPU whatever the device is."""
    draw = random.Random(0)
    texts = [
        bytes(draw.choices(LETTERS + b" ", k=length)) for _ in range(max(1, 200_000 // length))
    ]
    pairs = [(split(text, draw), split(text, draw)) for text in texts]

    def run() -> float:
        start = time.perf_counter()
        for pair in pairs:
            match_bytes(*pair)
        return len(texts) * length / MEGABYTE / (time.perf_counter() - start)

    return {"mb_per_s": spread([run() for _ in range(rounds)])}


def vocabulary_of(size: int) -> list[bytes | None]:
    """All bytes, words with a blank in front and without, and an end of turn."""
    draw = random.Random(0)
    words = {bytes([byte]) for byte in range(256)}
    while len(words) < size - 1:
        word = bytes(draw.choices(LETTERS, k=draw.randint(1, 8)))
        words.add(b" " + word if draw.random() < 0.6 else word)
    return [*sorted(words), None]


def loss_contestants() -> Contestants:
    pieces = vocabulary_of(VOCABULARY)
    tables = byte_vocabulary(pieces, VOCABULARY - 1, VOCABULARY, DEVICE)
    draw = random.Random(1)
    tokens = [draw.randrange(VOCABULARY - 1) for _ in range(ROWS)]
    places = [(row, t, d) for row, t in enumerate(tokens) for d in range(len(pieces[t] or b""))]
    at = Boundaries(*torch.tensor(places, device=DEVICE).T)
    leaves = [torch.randn(n, WIDTH, device=DEVICE) for n in (ROWS, VOCABULARY)]
    rows, weight = (leaf.mul_(WIDTH**-0.25).requires_grad_() for leaf in leaves)
    with torch.no_grad():
        theirs = next_byte_log_mass(torch.randn(ROWS, VOCABULARY, device=DEVICE), at, tables)
    labels, ones = torch.tensor(tokens, device=DEVICE), torch.ones(ROWS, device=DEVICE)

    def kl(logits_nV: Tensor, part: slice) -> Tensor:
        inside = (at.row >= part.start) & (at.row < part.stop)
        here = Boundaries(at.row[inside] - part.start, at.token[inside], at.depth[inside])
        kl_I = next_byte_kl(theirs[inside], next_byte_log_mass(logits_nV, here, tables))
        return kl_I.new_zeros(len(logits_nV)).index_add(0, here.row, kl_I)

    def products() -> None:
        with torch.no_grad():
            logits = rows @ weight.T
            _ = logits @ weight, logits.T @ rows

    def stepped(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            loss().backward()
            # Now, or the next call would begin by freeing them, and hide as much of its peak.
            rows.grad = weight.grad = None

        return step

    head, held = Head(weight), KINDS["byte_kd"].head_matrices
    return {
        "three products": products,
        "cross entropy": stepped(lambda: linear_cross_entropy(rows, labels, head, ones)[0]),
        "next-byte KL": stepped(lambda: linear_distance(rows, head, kl, matrices=held)[0]),
        "next-byte KL, all logits": stepped(lambda: kl(rows @ weight.T, slice(0, ROWS)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.byte_matching", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "date": date.today().isoformat(),
        **device_facts(),
        "matching": {n: matching_race(n, arguments.rounds) for n in (50, 400, 4000)},
        "loss": race(loss_contestants(), arguments.rounds, "three products"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
