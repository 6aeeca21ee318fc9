"""Prints a distillation's memory, traffic, FLOPs and hours before any GPU is asked for.

    python -m genrecal_ds.planner --teacher FOLDER --student FOLDER --gpus 128 --gpu a100-80g
    python -m genrecal_ds.planner --teacher qwen2-vl-72b --student qwen2-vl-7b --gpus 128 \\
        --gpu a100-80g --write plan/
    python -m genrecal_ds.planner --paper

The exit code is 0, or 2 where nothing fits. Then the smallest changes that would fit are named.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console

from genrecal_ds.console.arguments import positive
from genrecal_ds.console.refusals import Findings
from genrecal_ds.errors import UserError
from genrecal_ds.estimate.flops import SampleTokens
from genrecal_ds.planner import report as say
from genrecal_ds.planner.cost import Machine
from genrecal_ds.planner.facts import (
    GPUS,
    PAPER_BATCH,
    PAPER_PAIRS,
    PAPER_SAMPLES,
    model_folder,
    model_names,
)
from genrecal_ds.planner.search import Plan, Search, Work
from genrecal_ds.recipe.config import Recipe

if TYPE_CHECKING:
    from genrecal_ds.estimate.memory import Load

STAGES = tuple(PAPER_SAMPLES)


def main(argv: Sequence[str] | None = None) -> int:
    """0 planned, 2 nothing fits or a mistake of the user."""
    arguments = _parse(argv)
    report = Findings(Console())
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if arguments.paper:
                pairs = {pair: loads_of(*pair, Path(scratch), arguments) for pair in PAPER_PAIRS}
                _print(report, "The paper's pairs", say.paper_table(
                    {pair: loads["distill"] for pair, loads in pairs.items()}
                ))  # fmt: skip
                return 0
            if not (arguments.teacher and arguments.student):
                raise UserError("name --teacher and --student; or --paper")
            loads = loads_of(arguments.teacher, arguments.student, Path(scratch), arguments)
        return _plan(report, loads, arguments)
    except UserError as error:
        report.refuse(str(error))
        return 2


def loads_of(
    teacher: str, student: str, scratch: Path, arguments: argparse.Namespace
) -> "dict[str, Load]":
    """Collect what memory.py calculates with, by stage. Raises UserError for an unknown model."""
    length = arguments.max_length
    tree = {
        "run_dir": "planned", "precision": "bf16",
        "teacher": {"path": model_folder(teacher, scratch), "max_length": length},
        "student": {"path": model_folder(student, scratch), "max_length": length},
        "data": {"train": "SHARDS"}, "batch": {"global_batch": 1, "micro_batch": 1},
        "stages": [{"kind": kind, "epochs": 1} for kind in STAGES],
    }  # fmt: skip
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--teacher, --student: {message}") from None
    from genrecal_ds.estimate.sizes import load_of  # torch: no refusal waits for it

    gpus = arguments.gpus
    per_host = min(arguments.per_host, gpus)
    return {stage.kind: load_of(recipe, stage, gpus, per_host) for stage in recipe.stages}


def _plan(report: Findings, loads: "dict[str, Load]", arguments: argparse.Namespace) -> int:
    machine, works = _machine(arguments), _works(loads, arguments)
    report.section("Models")
    for line in say.models(works):
        report.say(line)
    sample = works["align"].sample
    title = (
        f"TFLOP of a sample of {sample.teacher:g} tokens, {sample.answer:g} of them answer, "
        f"{sample.visual:g} visual"
    )
    _print(report, title, say.flop_table(works))
    gpu = machine.gpu
    by_place = Search(works, machine).by_place()
    title = (
        f"{arguments.gpus} {arguments.gpu}, {arguments.per_host} a host: {gpu.tflops:g} TFLOP/s at "
        f"{machine.mfu:.0%}, {gpu.link:g} GB/s within a host, {gpu.net:g} between"
    )
    _print(report, title, say.places(by_place))
    if arguments.scale:
        _print(report, "Scale", say.scale(works, machine, arguments.per_host))
    plans = [plan for plan in by_place.values() if isinstance(plan, Plan)]
    if not plans:
        changes = say.smallest_changes(works, machine, arguments.gpus, arguments.per_host)
        named = " or ".join(changes) or "a smaller pair"
        report.refuse(f"--gpus {arguments.gpus} of {arguments.gpu}: nothing fits; try {named}")
        return 2
    best = min(plans, key=lambda plan: plan.cost)
    _print(report, "The fastest", say.chosen(best))
    for line in say.cache_size(works["distill"]):
        report.say(line)
    if arguments.write:
        names = arguments.teacher, arguments.student
        tree = say.recipe_tree(best, *names, arguments.max_length)
        path = say.write_recipe(arguments.write, tree)
        report.say(f"{path}: fill in data.train and model folders, then genrecal_ds.doctor {path}")
    return 0


def _print(report: Findings, title: str, lines: Iterable[str]) -> None:
    report.section(title)
    for line in lines:
        report.say(line)


def _machine(arguments: argparse.Namespace) -> Machine:
    gpu = GPUS[arguments.gpu]
    if arguments.net:
        gpu = gpu._replace(net=arguments.net)
    if arguments.link:
        gpu = gpu._replace(link=arguments.link)
    return Machine(gpu, arguments.mfu)


def _works(loads: "dict[str, Load]", arguments: argparse.Namespace) -> dict[str, Work]:
    tokens = min(arguments.tokens, arguments.max_length)
    if arguments.answer_tokens + arguments.visual_tokens >= tokens:
        raise UserError("--answer-tokens and --visual-tokens: together below --tokens")
    sample = SampleTokens(tokens, tokens, arguments.answer_tokens, arguments.visual_tokens)
    numbers = zip(STAGES, arguments.samples, arguments.global_batch, strict=True)
    return {kind: Work(loads[kind], count, batch, sample) for kind, count, batch in numbers}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m genrecal_ds.planner", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"models known by name: {', '.join(model_names())}",
    )  # fmt: skip
    stages = " ".join(STAGES)
    add = parser.add_argument
    add("--teacher", help="a model folder, a config.json, or a name below")
    add("--student")
    add("--gpus", type=positive(int), default=128)
    add("--gpu", choices=GPUS, default="a100-80g")
    add("--per-host", type=positive(int), default=8, help="GPUs of one host")
    add(
        "--net",
        type=positive(float),
        metavar="GB/S",
        help="that a collective over hosts brings one host (bus bandwidth of nccl-tests)",
    )
    add("--link", type=positive(float), metavar="GB/S", help="the same for a GPU within a host")
    add("--mfu", type=positive(float), default=0.4, help="part of the nominal FLOP/s reached")
    add("--max-length", type=positive(int), default=2048, help="tokens of a sample at most")
    add("--tokens", type=positive(float), default=1800, help="of an average sample")
    add("--answer-tokens", type=positive(float), default=150)
    add("--visual-tokens", type=positive(float), default=1280)
    add(
        "--samples",
        type=positive(float),
        nargs=3,
        default=tuple(PAPER_SAMPLES.values()),
        help=f"of {stages}; default the paper's",
    )
    add(
        "--global-batch",
        type=positive(int),
        nargs=3,
        default=tuple(PAPER_BATCH.values()),
        help=f"of {stages}; default the paper's",
    )
    add("--scale", action="store_true", help="the same on 8 to 8192 GPUs")
    add("--write", type=Path, metavar="FOLDER", help="the fastest as a recipe")
    add("--paper", action="store_true", help="the paper's pairs beside the paper's own figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
