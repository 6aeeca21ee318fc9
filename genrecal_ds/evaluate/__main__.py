"""Evaluates a model folder on shards.

    python -m genrecal_ds.evaluate runs/demo/sft/student runs/demo/data/heldout --out result.json
    torchrun --nproc_per_node 8 -m genrecal_ds.evaluate ...

Beside result.json lies result.predictions.jsonl, one line per sample. Both files are the same on
any number of ranks. After a kill, the same command goes on.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics import METRICS, metric_of, named, scores_by_kind

if TYPE_CHECKING:
    from genrecal_ds.data.reader import Sample


def evaluate(
    model: Path, shards: Path, out: Path, *, limit: int | None = None,
    batch_size: int = 64, max_new_tokens: int = 32, metric: str | None = None,
    instruction: str = "", final_after: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Generate and score answers, write `out` and predictions; return its content. A collective.

    metric: the name of one metric for all kinds; default: each kind's own. instruction: a line
    behind every question. final_after: a marker; what follows its last occurrence is scored.
    """
    from genrecal_ds import dist
    from genrecal_ds.data.index import ShardIndex
    from genrecal_ds.data.reader import ShardReader
    from genrecal_ds.evaluate.predict import discard, join_ranks, predict

    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no config.json; name an exported Hugging Face folder")
    if metric:
        named(metric)
    join_ranks()
    reader = ShardReader(ShardIndex.load(shards))
    num_samples = len(range(len(reader))[:limit])
    samples: list[Sample] = []
    refusal = None
    if dist.is_main():  # the others see their own batches only
        samples = [_without_pictures(reader.read(number)) for number in range(num_samples)]
        refusal = _refusal(samples, metric)  # before minutes of generation, not after
    dist.raise_together(refusal)
    facts = _facts(model, reader.index.fingerprint, batch_size, max_new_tokens, instruction)
    parts = out.with_suffix(".parts")
    predictions = predict(
        model, reader, num_samples, parts, facts | {"limit": limit}, batch_size, max_new_tokens,
        instruction,
    )  # fmt: skip
    result = None
    if dist.is_main():
        values = [
            float(
                METRICS[metric or metric_of(sample.kind)](
                    final_answer(prediction, final_after), sample.answers
                )
            )
            for sample, prediction in zip(samples, predictions, strict=True)
        ]
        kinds = [sample.kind for sample in samples]
        result = {
            "scores": scores_by_kind(kinds, values),
            "metrics": {kind: metric or metric_of(kind) for kind in sorted(set(kinds))},
            "final_after": final_after,
            **facts,
        }
        _write(out, result, samples, predictions, values)
    discard(parts)
    return dist.from_main(result)


def final_answer(text: str, marker: str) -> str:
    """Return what follows the marker's last occurrence, or all of a text without the marker."""
    return text.rpartition(marker)[2] if marker else text


def _without_pictures(sample: "Sample") -> "Sample":
    """Drop the pictures of a sample: thousands of them would stay in memory until the scores."""
    return replace(sample, images=[])


def _facts(
    model: Path, data: str, batch_size: int, max_new_tokens: int, instruction: str
) -> dict[str, Any]:
    """Collect the facts that decide the answers."""
    import torch
    from transformers import GenerationConfig

    from genrecal_ds.models.chat import ChatEncoder

    template = ChatEncoder(model, 1 << 20).template.source
    config = GenerationConfig()
    if (model / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(model)
    return {
        "model": str(model),
        "model_sha256": weights_hash(model),
        "data": data,
        "decoding": {
            "greedy": True, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
            "generation_config": config.to_diff_dict(),
        },
        "prompt": {
            "turns": "all but the last assistant turn",
            "instruction": instruction,
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "interval": "95 %: Wilson's where all values are 0 or 1, else bootstrap",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "device": str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip


def _write(
    out: Path, result: dict[str, Any], samples: "Sequence[Sample]", predictions: Sequence[str],
    values: Sequence[float],
) -> None:  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".predictions.jsonl").open("w") as file:
        for sample, prediction, value in zip(samples, predictions, values, strict=True):
            record = {
                "key": sample.key, "kind": sample.kind, "answers": sample.answers,
                "question": _text(sample.messages[-2]), "gold": _text(sample.messages[-1]),
                "prediction": prediction, "score": value,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    # Complete or absent: a runner that finds it takes the model for evaluated.
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, out)


def _refusal(samples: "Sequence[Sample]", metric: str | None) -> str | None:
    """Say why a sample cannot be scored: without gold answers it would count as wrong."""
    for sample in samples:
        if not sample.answers:
            return f"sample {sample.key}: no answers to score against; build shards with them"
        try:
            METRICS[metric or metric_of(sample.kind)]("", sample.answers)
        except UserError as error:
            return f"sample {sample.key}: {error}"
    return None


def _text(message: dict[str, Any]) -> str:
    """Join the text parts of a message; pictures may come before, between or after them."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def weights_hash(folder: Path) -> str:
    """sha256 over a folder's safetensors files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.evaluate", __doc__)
    parser.add_argument("model", type=Path, help="an exported Hugging Face folder")
    parser.add_argument("shards", type=Path, help="a folder made by data_tools.build")
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    parser.add_argument("--limit", type=int, help="only the first samples")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument(
        "--metric", help=f"for all kinds; default each kind's own: {', '.join(METRICS)}"
    )
    parser.add_argument("--instruction", default="", help="a line behind every question")
    parser.add_argument(
        "--final-after", default="", metavar="TEXT",
        help="score what follows its last occurrence in an answer, for answers that reason",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    result = evaluate(
        arguments.model, arguments.shards, arguments.out, limit=arguments.limit,
        batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
        metric=arguments.metric, instruction=arguments.instruction,
        final_after=arguments.final_after,
    )  # fmt: skip
    for kind, s in result["scores"].items() if os.environ.get("RANK", "0") == "0" else ():
        print(f"{kind:<16} {s['score']:.3f}  [{s['low']:.3f}, {s['high']:.3f}]  n={s['n']}")
    from genrecal_ds import dist

    dist.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
