"""Writes new shards in which a teacher's own answers replace the short ones.

    python -m genrecal_ds.evaluate TEACHER SHARDS --out answers.json --max-new-tokens 512 \\
        --instruction "Explain, then write Answer: and the answer." --final-after "Answer:"
    python -m data_tools.collect_responses SHARDS answers.predictions.jsonl --out shards/responses

A response is kept where its final answer matches the gold answer by the kind's own metric. The
question stays as it is in SHARDS (the paper's section 4 and appendix F). Wrong and empty responses
are left out and counted. Answers of another engine can be used too: a line per sample with `key`,
`prediction` and `score`. Pictures are copied byte for byte. After a kill, finished shards are kept.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.build import positive
from data_tools.builder import build, is_finished
from data_tools.progress import progress_bar
from data_tools.sources import RawSample, RowSource, assistant
from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.data.decode import SampleError
from genrecal_ds.data.index import ShardIndex, file_sha256, local_path
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.errors import UserError


class Responses(RowSource):
    """Gives a folder's samples, each with its response; SampleError for one that is not kept."""

    name = "responses"

    def __init__(self, folder: str | Path, predictions: Path, min_score: float):
        index = ShardIndex.load(folder)
        self._reader, self._min_score = ShardReader(index), min_score
        self._responses = read_responses(predictions)
        facts = f"{index.fingerprint} {file_sha256(predictions)} {min_score}"
        self.digest = hashlib.sha256(facts.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._reader)

    def row(self, number: int) -> RawSample:
        try:
            sample, members = self._reader.read(number), self._reader.members(number)
        except BadSample as error:
            raise SampleError("unreadable", str(error)) from None
        if sample.key not in self._responses:
            raise SampleError("no_response", f"{sample.key} was not answered")
        text, score = self._responses[sample.key]
        if score < self._min_score:
            raise SampleError("wrong_answer", f"{sample.key} scored {score:g}")
        if not text.strip():
            raise SampleError("empty_response", sample.key)
        messages = json.loads(members["json"])["messages"]
        messages[-1] = assistant(text.strip())
        pictures = [(name, data) for name, data in members.items() if name != "json"]
        images = [(name.rpartition(".")[2], data) for name, data in pictures]
        return RawSample(images, messages, sample.kind, sample.answers, sample.source_id)


def read_responses(path: Path) -> dict[str, tuple[str, float]]:
    """Read {key: (text, score)}. Raises UserError naming a line that lacks one of them."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; genrecal_ds.evaluate writes it beside its result")
    responses: dict[str, tuple[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            key, text, score = record["key"], record["prediction"], float(record["score"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line with key, prediction, score") from None
        if not isinstance(key, str) or not isinstance(text, str) or key in responses:
            raise UserError(
                f"{path}:{number}: key or prediction is no text, or the key came before"
            )
        responses[key] = (text, score)
    return responses


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 or 2 (a user's mistake)."""
    parser = command_parser("python -m data_tools.collect_responses", __doc__)
    parser.add_argument("shards", metavar="SHARDS")
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--min-score", type=float, default=1.0, help="of a kept response")
    parser.add_argument("--shard-size", default=512, type=positive, metavar="SAMPLES")
    parser.add_argument("--workers", type=positive, metavar="N", help="default: all cores")
    args = parser.parse_args(argv)
    source = Responses(args.shards, args.predictions, args.min_score)
    facts = {"responses": args.shards, "min_score": args.min_score}
    facts["shard_size"] = args.shard_size
    out = local_path(args.out)
    if is_finished(out, {**facts, "source_digest": source.digest}):
        print(f"{args.out}: already collected with these arguments, nothing to do")
        return 0
    with progress_bar() as progress:
        task = progress.add_task("collecting", total=len(source))
        report = build(
            source, out, arguments=facts, shard_size=args.shard_size,
            max_reject_rate=1.0, num_workers=args.workers or len(os.sched_getaffinity(0)),
            advance=lambda rows: progress.advance(task, rows),
        )  # fmt: skip
    print(f"{args.out}: {report.num_accepted} responses kept, {report.num_rejected} left out")
    for reason, count in report.rejected.most_common():
        print(f"  {reason}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
