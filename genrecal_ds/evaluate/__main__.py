"""Evaluate a model folder on shards.

    python -m genrecal_ds.evaluate runs/demo/sft/student runs/demo/data/heldout --out result.json

Beside result.json goes result.predictions.jsonl, one line per sample.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrecal_ds.errors import UserError
from genrecal_ds.evaluate.metrics import is_correct, scores_by_kind

if TYPE_CHECKING:
    from genrecal_ds.data.reader import Sample


def evaluate(
    model: Path, shards: Path, out: Path, *, limit: int | None = None,
    batch_size: int = 64, max_new_tokens: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """Generate, score, write out and its predictions; returns what out holds."""
    import torch
    from rich.progress import track

    from genrecal_ds.data.index import ShardIndex
    from genrecal_ds.data.reader import ShardReader
    from genrecal_ds.evaluate.generate import Generator

    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no config.json; name an exported Hugging Face folder")
    start = time.time()
    reader = ShardReader(ShardIndex.load(shards))
    samples = [reader.read(i) for i in range(len(reader))[:limit]]
    for sample in samples:
        _require_answers(sample)  # before minutes of generation, not after
    generator = Generator(model, max_new_tokens)
    predictions: list[str] = []
    num_batches = -(-len(samples) // batch_size)
    batches = generator.answers(samples, batch_size)
    for texts in track(batches, f"{model}", num_batches, disable=not sys.stdout.isatty()):
        predictions += texts
    outcomes = [is_correct(s.kind, p, s.answers) for s, p in zip(samples, predictions, strict=True)]
    result = {
        "scores": scores_by_kind([sample.kind for sample in samples], outcomes),
        "model": str(model),
        "model_sha256": weights_hash(model),
        "data": reader.index.fingerprint,
        "decoding": {
            "greedy": True, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
            "generation_config": generator.model.generation_config.to_diff_dict(),
        },
        "prompt": {
            "turns": "all but the last assistant turn",
            "chat_template_sha256": hashlib.sha256(generator.encoder.template.encode()).hexdigest(),
        },
        "metric": "last words, normalised, exact; boxes IoU >= 0.5; Wilson 95 % interval",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "device": str(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"),
        "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".predictions.jsonl").open("w") as file:
        for sample, prediction, correct in zip(samples, predictions, outcomes, strict=True):
            record = {
                "key": sample.key, "kind": sample.kind, "answers": sample.answers,
                "question": _text(sample.messages[-2]), "gold": _text(sample.messages[-1]),
                "prediction": prediction, "correct": correct,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    # Complete or absent: a runner that finds it takes the model for evaluated.
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, out)
    return result


def _require_answers(sample: "Sample") -> None:
    """A sample without answers would count as wrong, and a score of 0 would be believed."""
    if not sample.answers:
        raise UserError(f"sample {sample.key}: no answers to score against; build shards with them")
    is_correct(sample.kind, "", sample.answers)


def _text(message: dict[str, Any]) -> str:
    """The text parts of a message; a picture may come before, between or after them."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def weights_hash(folder: Path) -> str:
    """sha256 over a folder's safetensors files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m genrecal_ds.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", type=Path, help="an exported Hugging Face folder")
    parser.add_argument("shards", type=Path, help="a folder made by data_tools.build")
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    parser.add_argument("--limit", type=int, help="only the first samples")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    try:
        result = evaluate(
            arguments.model, arguments.shards, arguments.out, limit=arguments.limit,
            batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for kind, s in result["scores"].items():
        print(f"{kind:<16} {s['score']:.3f}  [{s['low']:.3f}, {s['high']:.3f}]  n={s['n']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
