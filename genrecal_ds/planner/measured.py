"""Prints trained stages beside the planner's arithmetic.

    python -m genrecal_ds.planner.measured RUN/STAGE [RUN/STAGE ...] [--peak TFLOPS]

Each phase of a median step, first steps left out, is one line: seconds, FLOP/s of all ranks, and
the share of --peak (of one rank). Several stages are compared with the last one: samples per
second, and what the FLOPs alone would give. A vision encoder's FLOPs are not counted here, because
logs do not say how many tokens were visual.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError
from genrecal_ds.estimate import flops
from genrecal_ds.planner.cost import wire
from genrecal_ds.recipe.recipe_file import load_recipe

WARM_UP = 5


@dataclass(frozen=True)
class Measured:
    """One stage's median step: seconds and FLOPs by phase."""

    stage: Path
    ranks: int
    samples: float
    step: float
    seconds: dict[str, float]
    flops: dict[str, float]
    received: int  # bytes of a rank, by arithmetic

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.step


def read(stage: Path) -> Measured:
    """Read RUN/STAGE from the run's recipe and the stage's log. Raises UserError without them."""
    from genrecal_ds.estimate.sizes import load_of

    log, recipe_file = stage / "metrics.jsonl", stage.parent / "recipe.yaml"
    for path in (log, recipe_file):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name a stage's folder of a run")
    recipe = load_recipe(recipe_file)
    trained = next((s for s in recipe.stages if s.name == stage.name), None)
    if trained is None:
        raise UserError(f"{stage}: {recipe_file} has no stage of that name")
    # The last step holds the validation; an incomplete batch is no step like others.
    lines = [json.loads(line) for line in log.read_text().splitlines()][WARM_UP:-1]
    lines = [line for line in lines if line["batch_share"] == 1]
    if not lines:
        raise UserError(f"{log}: fewer than {WARM_UP + 2} whole steps were logged")
    ranks = lines[0]["world_size"]
    load = load_of(recipe, trained, ranks, ranks)
    tokens = {
        name: statistics.mean(line["tokens"][name] for line in lines) for name in lines[0]["tokens"]
    }
    count = tokens["samples"]
    sample = flops.SampleTokens(*(tokens[n] / count for n in ("teacher", "student", "answer")))
    of_sample = flops.of_stage(load, sample)
    names = {name for line in lines for name in line["phases"]}
    micro_steps = recipe.accumulation_steps(trained, ranks)
    moved = wire(load)
    forwards = -(-micro_steps // load.teacher_batches)
    return Measured(
        stage,
        ranks,
        count,
        statistics.median(line["seconds"] for line in lines),
        {n: statistics.median(line["phases"].get(n, 0.0) for line in lines) for n in names},
        {name: count * value for name, value in of_sample.items()},
        forwards * moved.teacher + micro_steps * (moved.student + moved.reduced),
    )


def described(run: Measured, peak: float | None) -> list[str]:
    lines = [
        f"{run.stage}: {run.ranks} ranks, {1e3 * run.step:.1f} ms a step, "
        f"{run.samples_per_second:.1f} samples/s, {run.received / 1e6:.1f} MB come to a rank"
    ]
    for name in sorted(run.seconds, key=lambda name: -run.seconds[name]):
        seconds, work = run.seconds[name], run.flops.get(name, 0.0)
        line = f"  {name:<14}{1e3 * seconds:>9.1f} ms"
        if work and seconds:
            rate = work / seconds
            line += f"{rate / 1e9:>12.1f} GFLOP/s"
            line += f"{rate / (run.ranks * peak * 1e12):>8.1%}" if peak else ""
        lines.append(line)
    return lines


def compared(run: Measured, base: Measured) -> str:
    """The measured ratio of samples per second, and the ratio of FLOPs a sample."""
    measured = run.samples_per_second / base.samples_per_second
    own = sum(run.flops.values()) / run.samples
    other = sum(base.flops.values()) / base.samples
    return (
        f"{run.stage} against {base.stage}: {measured:.2f} times the samples/s; "
        f"by FLOPs alone {other / own:.2f}"
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.planner.measured", __doc__)
    parser.add_argument("stages", type=Path, nargs="+", metavar="RUN/STAGE")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of one rank's device")
    arguments = parser.parse_args(argv)
    runs = [read(stage) for stage in arguments.stages]
    for one in runs:
        print(*described(one, arguments.peak), sep="\n")
    for one in runs[:-1]:
        print(compared(one, runs[-1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
