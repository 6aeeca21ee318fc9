"""Counts every sample's tokens for a pair of models, pictures included.

Writes tokens-PAIR.npy and .json beside the shards; data.lengths=measured puts batches together by
them. Also writes tokens-PAIR.png with histograms, and prints a table. The encoders of training
count the tokens, so this takes as long as preparing one epoch of data.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from data_tools.build import positive
from data_tools.progress import progress_bar
from data_tools.writer import publish, temporary, write_json
from genrecal_ds.console.command import command
from genrecal_ds.data.index import ShardIndex, file_sha256
from genrecal_ds.data.lengths import TABLE_DTYPE, table_facts, table_path
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.errors import UserError

if TYPE_CHECKING:
    from genrecal_ds.models.chat import ChatEncoder

EXAMPLE = """example:
  python -m data_tools.tokens shards/train --teacher models/teacher --student models/student
"""
WHOLE = 1 << 30  # no truncation: the recipe's max_length is applied when the table is used


class CountedSamples:
    """Gives for sample i its counts by the table's columns, or why there are none."""

    def __init__(self, index: ShardIndex, encoders: "dict[str, ChatEncoder]") -> None:
        self.reader, self.encoders = ShardReader(index), encoders

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, number: int) -> dict[str, int] | str:
        from genrecal_ds.data.pair import Unusable

        counts = {}
        try:
            sample = self.reader.read(number)
            for side, encoder in self.encoders.items():
                chat = encoder.encode(sample.messages, sample.images, last_turn=True)
                counts[side] = len(chat.input_ids_T)
                counts[f"{side}_visual"] = encoder.num_visual(chat)
        except BadSample:
            return "unreadable: run data_tools.verify"
        except Unusable as error:
            return str(error)
        return counts


def count(
    index: ShardIndex, encoders: "dict[str, ChatEncoder]", num_workers: int
) -> tuple[np.ndarray, Counter[str]]:
    """(TABLE_DTYPE [num_samples] with -1 where a sample cannot be encoded, reasons)."""
    from torch.utils.data import DataLoader

    table = np.full(len(index), -1, TABLE_DTYPE)
    reasons: Counter[str] = Counter()
    loader: DataLoader = DataLoader(
        CountedSamples(index, encoders),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
    )
    with progress_bar() as progress:
        items = progress.track(loader, total=len(index), description="counting")
        for number, item in enumerate(items):
            if isinstance(item, str):
                reasons[item] += 1
                continue
            for name, value in item.items():
                table[name][number] = value
    return table, reasons


def write(index: ShardIndex, digests: dict[str, str], table: np.ndarray) -> Path:
    """Write the table beside the shards, its facts last."""
    path = table_path(index.directory, digests)
    with temporary(path).open("wb") as file:
        np.save(file, table, allow_pickle=False)
    publish(path)
    write_json(path.with_suffix(".json"), table_facts(index, digests, file_sha256(path)))
    return path


def summary(table: np.ndarray, sides: Sequence[str]) -> Table:
    """Mean and quantiles of tokens, by side and part, over the samples that can be encoded."""
    shown = Table("tokens", "mean", "median", "p95", "p99", "max", "total")
    for side in sides:
        good = table[table[side] >= 0]
        parts = {
            side: good[side],
            f"{side}, visual": good[f"{side}_visual"],
            f"{side}, text": good[side] - good[f"{side}_visual"],
        }
        for name, values in parts.items():
            if len(values):
                quantiles = np.percentile(values, [50, 95, 99, 100])
                numbers = [f"{value:,.0f}" for value in quantiles]
                total = f"{values.sum(dtype=np.int64):,}"
                shown.add_row(name, f"{values.mean():,.1f}", *numbers, total)
    return shown


def draw(table: np.ndarray, sides: Sequence[str], path: Path) -> None:
    """Histograms of tokens, one panel a side. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the histogram needs matplotlib: pip install genrecal_ds[eval]") from None
    figure = Figure(figsize=(5 * len(sides), 3.2), layout="constrained")
    for panel, side in zip(np.atleast_1d(figure.subplots(1, len(sides))), sides, strict=True):
        good = table[table[side] >= 0]
        bins = np.histogram_bin_edges(good[side], bins=40)
        panel.hist(good[side], bins, color="#9ecbff", label="all")
        panel.hist(good[f"{side}_visual"], bins, histtype="step", color="#0550ae", label="visual")
        panel.set(title=side, xlabel="tokens a sample", ylabel="samples")
        panel.legend()
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> int:
    """Count, write, show; 0, or 1 when no sample can be encoded."""
    from genrecal_ds.models.chat import ChatEncoder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are the parallelism here
    index = ShardIndex.load(args.directory)
    folders = {"teacher": args.teacher, "student": args.student}
    encoders = {side: ChatEncoder(path, WHOLE) for side, path in folders.items() if path}
    table, reasons = count(index, encoders, args.workers)
    digests = {side: encoder.digest for side, encoder in encoders.items()}
    path = write(index, digests, table)
    draw(table, list(encoders), path.with_suffix(".png"))
    Console().print(summary(table, list(encoders)))
    for reason, number in reasons.most_common():
        print(f"cannot be encoded: {reason}: {number}")
    print(f"{path}: {len(table)} samples; use it with data.lengths=measured")
    return 1 if sum(reasons.values()) == len(table) else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 (nothing can be encoded) or 2 (a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.tokens", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", metavar="SHARDS")
    parser.add_argument("--student", required=True, metavar="FOLDER")
    parser.add_argument("--teacher", metavar="FOLDER", help="left out: a run without a teacher")
    parser.add_argument("--workers", default=len(os.sched_getaffinity(0)), type=positive)
    args = parser.parse_args(argv)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
