"""Draws the paper's figures of a run, its error profile and its calibration, on one page.

    python -m genrecal_ds.analysis RUN SHARDS --out DIR
    python -m genrecal_ds.analysis RUN SHARDS --against RUN_WITHOUT_REGULARIZER --out DIR

RUN holds recipe.yaml and the stages align and distill. DIR gets analysis.json, the PNG files and
analysis.html, which needs no other file. Predictions (--predictions NAME=MODEL=FILE, repeated) are
those of genrecal_ds.evaluate on the same shards.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genrecal_ds.analysis import figures
from genrecal_ds.analysis.calibration import calibration, confidences
from genrecal_ds.analysis.features import boundary_points, embed, mixing, own_losses, untrained
from genrecal_ds.analysis.page import write_page
from genrecal_ds.analysis.probes import TrainedStage, cosines, single_turns
from genrecal_ds.analysis.report import read_log
from genrecal_ds.console.arguments import command_parser, positive
from genrecal_ds.console.command import command
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.recipe_file import load_recipe

STAGES = ("align", "distill")
FIGURES = {
    "losses.png": "Losses through the teacher's head, beside both models' own (figure 9)",
    "cosines.png": "Recalibrated rows, student side against teacher side (figure 7)",
    "features.png": "Both models' rows before and after the Recalibrator (figure 6)",
}


def analyse(
    run: Path, shards: Path, out: Path, against: Path | None = None, num_samples: int = 128
) -> dict[str, Any]:
    """Draw all figures into out and return their numbers."""
    recipe = _recipe_of(run)
    assert recipe.teacher is not None  # a run with stage align has one
    teacher = recipe.teacher.path
    if against is not None:
        other_source = _recipe_of(against).teacher
        if other_source is None or other_source.path != teacher:
            raise UserError(f"--against {against}: its teacher is not {teacher}, as in {run}")
    end = _last(run)
    reader = ShardReader(ShardIndex.load(shards))
    subject = TrainedStage.load(teacher, end)
    pairs = single_turns(subject, reader, num_samples)
    start = untrained(subject, teacher, recipe.student.path, recipe.seed)

    points = {
        f"{place} the Recalibrator, {when}": values
        for when, of in (("at the start", start), ("at the end", subject))
        for place, values in boundary_points(of, pairs).items()
    }
    compared = {run.name if against is None else "with the regularizer": cosines(subject, pairs)}
    if against is not None:
        other = TrainedStage.load(teacher, _last(against))
        compared["without"] = cosines(other, single_turns(other, reader, num_samples))
    own = own_losses(start, pairs)

    out.mkdir(parents=True, exist_ok=True)
    logs = {stage: read_log(run / stage) for stage in STAGES}
    figures.loss_curves(logs, own, out / "losses.png")
    figures.cosine_matrices(compared, out / "cosines.png")
    figures.embeddings({title: embed(sides) for title, sides in points.items()},
                       out / "features.png")  # fmt: skip
    return {
        "run": str(run), "num_samples": len(pairs), "own_ce": own, "cosines": compared,
        "nearest_is_of_the_other_model": {title: mixing(sides) for title, sides in points.items()},
    }  # fmt: skip


def answers_in_numbers(
    models: Sequence[tuple[str, Path, Path]], shards: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(calibration by model, error profile) of (name, model's folder, predictions file)."""
    reader = ShardReader(ShardIndex.load(shards))
    records = {name: _predictions(path, len(reader)) for name, _, path in models}
    counts = {len(lines) for lines in records.values()}
    if len(counts) > 1:
        raise UserError(f"predictions: {sorted(counts)} samples; score all models on the same ones")
    samples = [reader.read(number) for number in range(counts.pop())]
    sure = {}
    for name, folder, _ in models:
        values = confidences(folder, samples, [line["prediction"] for line in records[name]])
        sure[name] = calibration(values, [line["score"] for line in records[name]])
    first, last = records[models[0][0]], records[models[-1][0]]
    profile: dict[str, dict[str, int]] = {}
    for a, b in zip(first, last, strict=True):
        outcome = f"{_verdict(a)}, then {_verdict(b)}"
        of_kind = profile.setdefault(a["kind"], {})
        of_kind[outcome] = of_kind.get(outcome, 0) + 1
    return sure, {"of": [models[0][0], models[-1][0]], "kinds": profile}


def _verdict(record: dict[str, Any]) -> str:
    return "right" if record["score"] == 1 else "wrong"


def _predictions(path: Path, most: int) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"--predictions: {path} is missing; genrecal_ds.evaluate writes it")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not 0 < len(lines) <= most:
        raise UserError(f"--predictions: {path} has {len(lines)} lines, the shards {most} samples")
    return lines


def _recipe_of(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: no recipe.yaml; name the folder of a run")
    recipe = load_recipe(run / "recipe.yaml")
    if recipe.teacher is None or not any(stage.facts.has_recalibrator for stage in recipe.stages):
        raise UserError(f"{run}: trained no Recalibrator; name a run with stages align or distill")
    return recipe


def _last(run: Path) -> Path:
    """Find the latest finished stage with a Recalibrator."""
    done = [stage for stage in STAGES if (run / stage / "recalibrator").is_dir()]
    if not done:
        raise UserError(f"{run}: neither align nor distill has ended; its Recalibrator is missing")
    return run / done[-1]


def _named(text: str) -> tuple[str, Path, Path]:
    name, *rest = text.split("=")
    if len(rest) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL=FILE")
    return name, Path(rest[0]), Path(rest[1])


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.analysis", __doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("shards", type=Path, help="held-out ones")
    parser.add_argument("--against", type=Path, help="a run that differs in the regularizer")
    parser.add_argument("--predictions", type=_named, action="append", default=[])
    parser.add_argument("--samples", type=positive(int), default=128, help="conversations drawn")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    result = analyse(
        arguments.run, arguments.shards, arguments.out, arguments.against, arguments.samples
    )
    if arguments.predictions:
        sure, profile = answers_in_numbers(arguments.predictions, arguments.shards)
        result |= {"calibration": sure, "errors": profile}
    (arguments.out / "analysis.json").write_text(json.dumps(result, indent=2) + "\n")
    write_page(result, FIGURES, arguments.out)
    for title, cosine in result["cosines"].items():
        print(f"{title}: diagonal {cosine['diagonal']:.3f}, off {cosine['off_diagonal']:.3f}")
    print(arguments.out / "analysis.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
