"""Builds a folder of shards from a source.

Every sample is checked by decoding it whole, with the reader's own functions. A bad one is
written to rejects.jsonl with its reason; too many of them, or none accepted, is a failure and
leaves no manifest, so nothing can train on the folder.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_tools.builder import (
    REJECTS_NAME,
    Busy,
    build,
    build_share,
    changed_of,
    is_finished,
    reopen,
)
from data_tools.progress import progress_bar
from data_tools.sources import (
    Source,
    ai2d,
    chartqa,
    digits,
    docvqa,
    llava,
    parquet,
    refcoco,
    table,
    textvqa,
    vqa,
    webdataset,
)
from data_tools.sources.items import is_read
from genrecal_ds.console.command import command
from genrecal_ds.data.index import MANIFEST_NAME, local_path
from genrecal_ds.errors import UserError

# A new format is one entry here and one file in data_tools/sources.
FORMATS: dict[str, Callable[..., Source]] = {
    "ai2d": ai2d.open_source,
    "chartqa": chartqa.open_source,
    "csv": table.open_source,
    "digits": digits.open_source,
    "docvqa": docvqa.open_source,
    "llava": llava.open_source,
    "okvqa": vqa.open_okvqa,
    "parquet": parquet.open_source,
    "refcoco": refcoco.open_source,
    "textvqa": textvqa.open_source,
    "vqav2": vqa.open_vqav2,
    "webdataset": webdataset.open_source,
}

EXAMPLE = """examples:
  python -m data_tools.build digits --format digits --out shards/train --num-samples 20000
  python -m data_tools.build mix665k.json --format llava --images images --out shards/llava
  python -m data_tools.build vqav2 --format vqav2 --split val --out shards/vqav2-val
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m data_tools.build`."""
    result = argparse.ArgumentParser(
        prog="python -m data_tools.build",
        description="Build a folder of webdataset shards with an index; docs/data.md has the "
        "formats. Run it again after an interruption and it goes on.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("source", metavar="SOURCE", help="file or folder to read; `digits` for digits")
    add("--format", required=True, choices=sorted(FORMATS))
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    add("--images", metavar="DIR", help="root of the pictures; no path leads out of it")
    add("--split", metavar="NAME", help="of formats and folders that have splits; a+b for both")
    add("--ignore", action="append", metavar="KEY", help="content of the items to leave out")
    add("--allow-links", dest="links", metavar="DIR", help="a folder that links may lead to")
    add("--num-samples", type=positive, metavar="N", help="of digits; default 1000")
    add("--seed", type=not_negative, metavar="S", help="of digits; default 0")
    add("--kinds", metavar="A,B", help="of digits: only these kinds")
    add("--wrong-share", type=float, metavar="R", help="of digits: share of wrong taught answers")
    add("--shard-size", default=512, type=positive, metavar="ROWS")
    add("--workers", type=positive, metavar="N", help="processes; default one per core")
    add("--max-reject-rate", default=0.01, type=float, metavar="R", help="default 0.01")
    add("--retry-rejects", action="store_true", help="judge rejects whose pictures changed again")
    add("--task", type=task, metavar="I/N", help="make a share of the shards; see launch/slurm")
    return result


# Of formats, not of the build.
OPTIONS = (
    "images", "split", "num_samples", "seed", "kinds", "wrong_share", "ignore", "links",
)  # fmt: skip


def positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> int:
    """An argparse type: an integer from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def task(text: str) -> tuple[int, int]:
    """An argparse type: I/N with 0 <= I < N."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, 0 <= I < N")
    return int(number), int(count)


def open_source(args: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """(source, the options it was given). Raises UserError for an option it does not take."""
    opener = FORMATS[args.format]
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    taken = inspect.signature(opener).parameters
    for name in options:
        if name not in taken:
            flag = {"links": "--allow-links"}.get(name, "--" + name.replace("_", "-"))
            raise UserError(f"{flag}: --format {args.format} does not take it; leave it out")
    return opener(args.source, **options), options


def run(args: argparse.Namespace) -> int:
    """Build as asked and print a summary; 0, or 1 when too many samples were rejected."""
    out = local_path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder for --out")
    source, options = open_source(args)
    # what nobody reads changes no byte: a build that stopped at it goes on
    options["ignore"] = sorted(key for key in options.get("ignore", ()) if is_read(key))
    options = {name: value for name, value in options.items() if value != []}
    arguments = {"source": args.source, "format": args.format, **options}
    arguments["shard_size"] = args.shard_size
    if is_finished(out, {**arguments, "source_digest": source.digest}):
        changed = changed_of(out)
        if not changed:
            print(f"{args.out}: already built with these arguments, nothing to do")
            return 0
        if not args.retry_rejects:
            print(
                f"{args.out}: already built; the pictures of {len(changed)} rejects changed since, "
                f"the first of row {changed[0]['row']}; --retry-rejects judges them again"
            )
            return 0
        reopen(source, out, arguments=arguments, shard_size=args.shard_size)
    try:
        if args.task and not _share_is_last(source, out, arguments, args):
            return 0
        return _build(source, out, arguments, args)
    except Busy as error:
        if not args.task:
            raise
        print(f"{error}: it makes what is missing, or another task will")
        return 0


def _share_is_last(
    source: Source, out: Path, arguments: dict[str, Any], args: argparse.Namespace
) -> bool:
    """Make a task's share; return whether no shard is missing, so that the index can be written."""
    with progress_bar() as progress:
        bar = progress.add_task("building a share", total=len(source) // args.task[1])
        is_last = build_share(
            source,
            out,
            args.task,
            arguments=arguments,
            shard_size=args.shard_size,
            num_workers=args.workers or len(os.sched_getaffinity(0)),
            advance=lambda rows: progress.advance(bar, rows),
        )
    print(f"{args.out}: task {args.task[0]} of {args.task[1]} has made its shards")
    return is_last and not (out / MANIFEST_NAME).exists()


def _build(source: Source, out: Path, arguments: dict[str, Any], args: argparse.Namespace) -> int:
    with progress_bar() as progress:
        task = progress.add_task("building", total=len(source))
        report = build(
            source,
            out,
            arguments=arguments,
            shard_size=args.shard_size,
            max_reject_rate=args.max_reject_rate,
            num_workers=args.workers or len(os.sched_getaffinity(0)),
            advance=lambda rows: progress.advance(task, rows),
        )
    print(f"{args.out}: {report.num_accepted} samples, {report.num_rejected} rejected")
    for line in report.lines():
        print(line)
    if report.reject_rate > args.max_reject_rate:
        print(
            f"{out / REJECTS_NAME}: {report.reject_rate:.1%} rejected, more than "
            f"--max-reject-rate {args.max_reject_rate}; no manifest written",
            file=sys.stderr,
        )
        return 1
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 (too many rejects) or 2 (a user's mistake)."""
    args = parser().parse_args(argv)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
