"""Build a folder of shards from a source.

Every sample is checked by decoding it whole, with the reader's own functions. A bad one is
written to rejects.jsonl with its reason; too many of them, or none accepted, is a failure and
leaves no manifest, so nothing can train on the folder.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from data_tools.sources import RawSample
from data_tools.writer import CheckedSample, ShardWriter, publish, temporary
from genrecal_ds.data.decode import SampleError, decode_image, decode_record
from genrecal_ds.data.index import MANIFEST_NAME, ShardIndex, local_path, read_manifest
from genrecal_ds.errors import UserError

REJECTS_NAME = "rejects.jsonl"
_LEFTOVER = re.compile(
    r"shard-\d{6,}\.tar|index\.npy|rejects\.jsonl"
    r"|\.(shard-\d{6,}\.tar|index\.npy|rejects\.jsonl|manifest\.json)\.tmp"
)
EXAMPLE = """example:
  python -m data_tools.build digits --format digits --out shards/train --num-samples 20000
"""


@dataclass
class BuildReport:
    """What a build did: samples accepted, and rejected ones by reason."""

    num_accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def reject_rate(self) -> float:
        num_rejected = sum(self.rejected.values())
        return num_rejected / max(1, num_rejected + self.num_accepted)


def build(
    samples: Iterable[RawSample],
    out: Path,
    *,
    source: str,
    arguments: dict[str, Any],
    shard_size: int = 512,
    max_reject_rate: float = 0.01,
) -> BuildReport:
    """Write checked samples to `out` under keys {source}/{row:09d}; see the module's docstring.

    `arguments` goes into the manifest and identifies the build. The manifest is left out when
    more than max_reject_rate of the samples are bad. Raises UserError when none is accepted.
    """
    report = BuildReport()
    _clear_unfinished(out)
    out.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out, shard_size)
    rejects_path = out / REJECTS_NAME
    try:
        with temporary(rejects_path).open("w", encoding="utf-8") as rejects:
            for row, raw in enumerate(samples):
                try:
                    writer.write(check(raw, source, row))
                    report.num_accepted += 1
                except SampleError as error:
                    report.rejected[error.reason] += 1
                    line = {"row": row, "source_id": str(raw.source_id), "reason": error.reason}
                    rejects.write(json.dumps({**line, "detail": error.detail}) + "\n")
        publish(rejects_path)
        if report.num_accepted == 0:
            reasons = ", ".join(sorted(report.rejected)) or "the source gave no sample"
            raise UserError(f"{out}: nothing to write ({reasons}); see the source and its filters")
        if report.reject_rate <= max_reject_rate:
            writer.finish(arguments, dict(report.rejected))
    finally:
        writer.close()
    return report


def check(raw: RawSample, source: str, row: int) -> CheckedSample:
    """Encode the record, decode everything as the reader will; raises SampleError."""
    record_json = {
        "messages": raw.messages,
        "kind": raw.kind,
        "answers": raw.answers,
        "source": source,
        "source_id": raw.source_id,
    }
    try:
        text = json.dumps(record_json, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError("text_encoding", f"lone surrogate: {error}"[:200]) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError("record_json", f"{type(error).__name__}: {error}"[:200]) from error
    record = decode_record(encoded)
    if record.num_images != len(raw.images):
        raise SampleError(
            "image_count", f"{record.num_images} image parts but {len(raw.images)} images"
        )
    members, sizes = [("json", encoded)], []
    for number, (extension, data) in enumerate(raw.images):
        sizes.append(decode_image(data, extension).size)
        members.append((f"{number}.{extension}", data))  # the source's bytes, never re-encoded
    return CheckedSample(f"{source}/{row:09d}", members, record.kind, record.text_bytes, sizes)


def is_finished(out: Path, arguments: dict[str, Any]) -> bool:
    """True for a sound folder of the same build; UserError for a folder of another one."""
    if not (out / MANIFEST_NAME).exists():
        return False
    found = read_manifest(out).get("build")
    found = found if isinstance(found, dict) else {}
    for key in sorted(arguments.keys() | found.keys()):
        if arguments.get(key) != found.get(key):
            raise UserError(
                f"{out}: already built with {key}={found.get(key)!r}, asked for "
                f"{arguments.get(key)!r}; choose another --out or delete the folder"
            )
    ShardIndex.load(out)
    return True


def _clear_unfinished(out: Path) -> None:
    """Remove what an interrupted build of ours left; refuse a folder with anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder for --out")
    leftovers = sorted(out.iterdir()) if out.exists() else []
    for path in leftovers:
        if path.is_dir() or not _LEFTOVER.fullmatch(path.name):
            raise UserError(f"{path}: not from an unfinished build; choose an empty or new --out")
    for path in leftovers:
        path.unlink()


class RateColumn(ProgressColumn):
    """Samples per second of a progress task."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "-/s")


def progress_bar() -> Progress:
    """A progress line on stderr with count, rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _digits(args: argparse.Namespace) -> Iterator[RawSample]:
    from data_tools.sources import digits

    if args.source != "digits":
        raise UserError(f"SOURCE {args.source!r}: --format digits draws its own; write `digits`")
    kinds = tuple(args.kinds.split(",")) if args.kinds else None
    if unknown := sorted(set(kinds or ()) - set(digits.KINDS)):
        raise UserError(f"--kinds {','.join(unknown)}: digits has {', '.join(digits.KINDS)}")
    return digits.samples(args.split, args.num_samples, args.seed, kinds=kinds)


# A new source format is one entry here and one file in data_tools/sources.
FORMATS: dict[str, Callable[[argparse.Namespace], Iterator[RawSample]]] = {"digits": _digits}


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m data_tools.build`."""
    result = argparse.ArgumentParser(
        prog="python -m data_tools.build",
        description="Build a folder of webdataset shards with an index.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", metavar="SOURCE", help="what to read; `digits` for digits")
    result.add_argument("--format", required=True, choices=sorted(FORMATS))
    result.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    result.add_argument("--split", default="train", choices=("train", "validation", "heldout"))
    result.add_argument("--num-samples", default=1000, type=positive, metavar="N")
    result.add_argument("--seed", default=0, type=not_negative, metavar="S")
    result.add_argument("--kinds", default="", metavar="A,B", help="only these kinds; default all")
    result.add_argument("--shard-size", default=512, type=positive, metavar="SAMPLES")
    result.add_argument(
        "--max-reject-rate", default=0.01, type=float, metavar="R", help="default 0.01"
    )
    return result


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


def run(args: argparse.Namespace) -> int:
    """Build as asked and print a summary; 0, or 1 when too many samples were rejected."""
    names = ("source", "format", "split", "num_samples", "seed", "kinds", "shard_size")
    arguments = {name: getattr(args, name) for name in names}
    out = local_path(args.out)
    if is_finished(out, arguments):
        print(f"{args.out}: already built with these arguments, nothing to do")
        return 0
    with progress_bar() as progress:
        samples = FORMATS[args.format](args)
        report = build(
            progress.track(samples, total=args.num_samples, description="building"),
            out,
            source=f"{args.format}-{args.split}",
            arguments=arguments,
            shard_size=args.shard_size,
            max_reject_rate=args.max_reject_rate,
        )
    num_rejected = sum(report.rejected.values())
    print(f"{args.out}: {report.num_accepted} samples, {num_rejected} rejected")
    if report.reject_rate > args.max_reject_rate:
        reasons = ", ".join(f"{name} {count}" for name, count in report.rejected.most_common())
        print(
            f"{out / REJECTS_NAME}: {report.reject_rate:.1%} rejected ({reasons}), more than "
            f"--max-reject-rate {args.max_reject_rate}; no manifest written",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 (too many rejects) or 2 (a user's mistake)."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
