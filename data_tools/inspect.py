"""Shows a folder of shards: its kinds, and samples in the terminal or as an HTML page.

Text from the data is printed with control characters escaped, so it cannot steer the terminal.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.build import not_negative, positive
from genrecal_ds.console.command import command, complain
from genrecal_ds.console.text import printable
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import BadSample, Sample, ShardReader
from genrecal_ds.errors import UserError

EXAMPLE = """example:
  python -m data_tools.inspect shards/train --sample 12 --html sheet.html --count 48
"""
MAX_SHARD_ROWS = 10


def overview(index: ShardIndex) -> Table:
    """One row per shard (the first ones) and their total."""
    table = Table("shard", "samples", "bytes", title=Text(printable(str(index.directory))))
    for shard in index.shards[:MAX_SHARD_ROWS]:
        table.add_row(shard.name, f"{shard.count:,}", f"{shard.num_bytes:,}")
    if len(index.shards) > MAX_SHARD_ROWS:
        table.add_row(f"... {len(index.shards) - MAX_SHARD_ROWS} more", "", "")
    total = sum(shard.num_bytes for shard in index.shards)
    table.add_section()
    table.add_row(f"{len(index.shards)} shards", f"{len(index):,}", f"{total:,}")
    return table


def kinds(index: ShardIndex) -> Table:
    """One row per kind: counts by number of images, mean text, largest picture."""
    table = Table("kind", "samples", "text only", "1 image", "2+ images", "text bytes", "max size")
    for code, name in enumerate(index.kinds):
        records = index.records[index.records["kind"] == code]
        by_class = np.bincount(np.minimum(records["num_images"], 2), minlength=3)
        largest = f"{records['max_width'].max()}x{records['max_height'].max()}"
        table.add_row(
            Text(printable(name)),
            f"{len(records):,}",
            *(f"{count:,}" for count in by_class),
            f"{records['text_bytes'].mean():.0f}",
            largest,
        )
    return table


def example(sample: Sample) -> Table:
    """The sample's fields and turns, one a row; a picture shows as [image WxH]."""
    table = Table("field", "value", title=Text(printable(sample.key)))
    table.add_row("kind", Text(printable(sample.kind)))
    table.add_row("answers", Text(printable(repr(sample.answers))))
    images = iter(sample.images)
    for message in sample.messages:
        parts = [
            part["text"] if part["type"] == "text" else "[image {}x{}]".format(*next(images).size)
            for part in message["content"]
        ]
        role = message["role"] + ("" if message.get("taught", True) else " (not taught)")
        table.add_row(role, Text(printable(" ".join(parts))))
    return table


def write_sheet(index: ShardIndex, first: int, count: int, path: Path) -> None:
    """A page of `count` samples from `first` on; damaged ones show their reason."""
    from data_tools.contact_sheet import contact_sheet

    reader = ShardReader(index)

    def samples() -> Iterator[tuple[int, Sample | BadSample]]:
        for number in range(first, min(first + count, len(index))):
            try:
                yield number, reader.read(number)
            except BadSample as error:
                yield number, error

    path.write_text(contact_sheet(str(index.directory), samples()), encoding="utf-8")
    print(f"{path}: samples {first} to {min(first + count, len(index)) - 1}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 (the sample is bad) or 2 (a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.inspect",
        description="Show shards, kinds and one decoded sample of a folder.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--sample", type=not_negative, default=0, metavar="I", help="the example")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="a contact sheet from sample I on"
    )
    parser.add_argument("--count", type=positive, default=24, metavar="N", help="of samples in it")
    args = parser.parse_args(argv)
    try:
        index = ShardIndex.load(args.directory)
        if args.sample >= len(index):
            raise UserError(f"--sample {args.sample}: {args.directory} has 0..{len(index) - 1}")
        if args.html:
            write_sheet(index, args.sample, args.count, args.html)
        sample = ShardReader(index).read(args.sample)
    except BadSample as error:
        complain(error)
        return 1
    console = Console()
    for table in (overview(index), kinds(index), example(sample)):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
