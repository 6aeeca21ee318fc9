"""Answers all samples on any number of ranks, and goes on after a kill.

Batches are fixed and dealt out to the ranks, so the ranks do not decide which samples are answered
together. The answers are the same on one rank and on many, also where padding rounds differently.

    OUT.parts/identity.json     what the answers belong to; another identity is refused
    OUT.parts/0001-000.jsonl    one rank's batches in one start: {"batch": 3, "answers": [...]}
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from genrecal_ds import dist
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.evaluate.generate import Generator


def join_ranks() -> None:
    """Join the other ranks, under torchrun or SLURM; they only tell each other when they end."""
    if dist.world_size() > 1 and not dist.is_initialized():
        torch.distributed.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.local_rank())


def predict(
    model: Path, reader: ShardReader, num_samples: int, parts: Path, identity: dict[str, Any],
    batch_size: int, max_new_tokens: int, instruction: str = "",
) -> list[str]:  # fmt: skip
    """Return one answer for each of the first samples, in order, on every rank. A collective.

    Raises UserError where parts belong to another identity.
    """
    message = None
    if dist.is_main():
        message = _claim(parts, identity)
    dist.raise_together(message)
    num_batches = -(-num_samples // batch_size)
    known = dist.from_main(_read(parts) if dist.is_main() else None)
    missing = [batch for batch in range(num_batches) if batch not in known]
    own = missing[dist.rank() :: dist.world_size()]
    if own:
        generator = Generator(model, max_new_tokens, instruction)
        path = _new_part(parts)
        is_shown = dist.is_main() and sys.stdout.isatty()
        with path.open("w") as file:
            for batch in track(own, f"{model}", disable=not is_shown):
                numbers = range(batch * batch_size, min((batch + 1) * batch_size, num_samples))
                samples = [reader.read(number) for number in numbers]
                (answers,) = generator.answers(samples, batch_size)
                file.write(json.dumps({"batch": batch, "answers": answers}) + "\n")
                file.flush()
    dist.barrier()
    by_batch = dist.from_main(_read(parts) if dist.is_main() else None)
    return [answer for batch in range(num_batches) for answer in by_batch[batch]]


def discard(parts: Path) -> None:
    """Remove the parts, after the result is written."""
    if dist.is_main():
        shutil.rmtree(parts, ignore_errors=True)
    dist.barrier()


def _claim(parts: Path, identity: dict[str, Any]) -> str | None:
    """Make a new folder, or say what is wrong with the one that is there."""
    path = parts / "identity.json"
    if path.is_file():
        recorded = json.loads(path.read_text())
        for key, value in json.loads(json.dumps(identity)).items():
            if recorded.get(key) != value:
                return (
                    f"{parts}: answers of an evaluation with another {key} lie here; remove it, or "
                    "name another --out"
                )
        return None
    parts.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity, indent=2) + "\n")
    return None


def _new_part(parts: Path) -> Path:
    """Name a new file for this start: an earlier file may end in half a line."""
    rank = f"{dist.rank():04d}"
    return parts / f"{rank}-{len(list(parts.glob(f'{rank}-*.jsonl'))):03d}.jsonl"


def _read(parts: Path) -> dict[int, list[str]]:
    """Read the whole batches of all starts."""
    return {
        line["batch"]: line["answers"]
        for path in sorted(parts.glob("*-*.jsonl"))
        for line in _lines(path)
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():  # a kill may leave half a line
        yield json.loads(line)
