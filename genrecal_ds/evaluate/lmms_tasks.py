"""Writes shards as a task of lmms-eval: its models answer, its functions score.

    python -m genrecal_ds.evaluate.lmms_tasks SHARDS OUT --name heldout
    python -m lmms_eval --include_path OUT --tasks genrecal_heldout --model genrecal_export \\
        --model_args pretrained=EXPORT --batch_size 64

OUT gets genrecal_heldout.yaml, heldout.parquet and genrecal_tasks.py, which names the functions
below. lmms-eval wants other packages than training does: give it a virtual environment of its own,
with this package in it (docs/evaluation.md).
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics import METRICS, metric_of

Doc = Mapping[str, Any]
FUNCTIONS = """from genrecal_ds.evaluate.lmms_tasks import (  # noqa: F401
    to_messages, to_target, to_text, to_visual, with_scores,
)
"""


def write_task(shards: Path, out: Path, name: str, max_new_tokens: int) -> int:
    """Write the three files; returns the number of samples. Raises UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("lmms_tasks: needs pyarrow: pip install 'genrecal_ds[parquet]'") from None
    if not name.replace("_", "").isalnum():
        raise UserError(f"--name {name}: letters, digits and _ only")
    reader = ShardReader(ShardIndex.load(shards))
    rows = [_row(reader, number) for number in range(len(reader))]
    out.mkdir(parents=True, exist_ok=True)
    data = out.resolve() / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    (out / "genrecal_tasks.py").write_text(FUNCTIONS)
    functions = {
        "doc_to_visual": "to_visual", "doc_to_text": "to_text", "doc_to_messages": "to_messages",
        "doc_to_target": "to_target", "process_results": "with_scores",
    }  # fmt: skip
    settings = {
        "task": f"genrecal_{name}",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": [{"version": 1, "fingerprint": reader.index.fingerprint}],
    }
    tagged = "".join(f"{key}: !function genrecal_tasks.{f}\n" for key, f in functions.items())
    text = yaml.safe_dump(settings, sort_keys=False) + tagged
    (out / f"genrecal_{name}.yaml").write_text(text)
    return len(rows)


def _row(reader: ShardReader, number: int) -> dict[str, Any]:
    sample, members = reader.read(number), reader.members(number)
    return {
        "key": sample.key,
        "kind": sample.kind,
        "answers": sample.answers,
        "messages": json.dumps(sample.messages),
        "pictures": [data for member, data in members.items() if member != "json"],
    }


def to_visual(doc: Doc) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in doc["pictures"]]


def to_text(doc: Doc, lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the last question, for models that take no turns."""
    parts = json.loads(doc["messages"])[-2]["content"]
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def to_messages(doc: Doc, lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """Return all turns but the last, with the pictures in their places."""
    pictures = iter(to_visual(doc))

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "url": next(pictures)} if part["type"] == "image" else part

    return [
        {"role": message["role"], "content": [part_of(part) for part in message["content"]]}
        for message in json.loads(doc["messages"])[:-1]
    ]


def to_target(doc: Doc) -> str:
    return doc["answers"][0]


def with_scores(doc: Doc, results: list[str]) -> dict[str, float]:
    """Score by lmms-eval's own function where it has one for the kind, else by ours."""
    return {"score": score_of(doc["kind"], results[0], list(doc["answers"]))}


def score_of(kind: str, prediction: str, answers: list[str]) -> float:
    metric = metric_of(kind)
    if metric == "relaxed":
        from lmms_eval.tasks.chartqa.utils import relaxed_correctness

        return float(max(relaxed_correctness(prediction, answer) for answer in answers))
    if metric == "anls":
        from lmms_eval.api.metrics import anls

        return float(anls(answers, [prediction])["anls"])
    if metric == "vqa":
        from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

        doc = {"answers": [{"answer": answer, "id": i} for i, answer in enumerate(answers)],
               "question_id": 0}  # fmt: skip
        return float(vqav2_process_results_val(doc, [prediction])["exact_match"])
    return float(METRICS[metric](prediction, answers))


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.evaluate.lmms_tasks", __doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True, help="the task will be called genrecal_NAME")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args(argv)
    count = write_task(arguments.shards, arguments.out, arguments.name, arguments.max_new_tokens)
    print(f"{arguments.out / f'genrecal_{arguments.name}.yaml'}: {count} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
