"""Prints a plan: models, FLOPs, places of the teacher, scale; writes it as a recipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from genrecal_ds.estimate import flops
from genrecal_ds.estimate.memory import GIB, NOT_COUNTED, Load
from genrecal_ds.planner.cost import Machine
from genrecal_ds.planner.facts import (
    GPUS,
    PAPER_FORWARD,
    PAPER_GPUS,
    PAPER_HOURS,
    PAPER_PAIRS,
    PAPER_RECALIBRATOR,
    PAPER_SAMPLES,
)
from genrecal_ds.planner.search import Misfit, Plan, Search, Work, at, shorter

SCALE = tuple(2**power for power in range(3, 14))  # 8 .. 8192 GPUs
LENGTHS = (1024, 512, 256)


def models(works: dict[str, Work]) -> Iterator[str]:
    load = works["distill"].load
    assert load.teacher is not None
    for side, model in (("teacher", load.teacher), ("student", load.student)):
        decoder = model.decoder
        yield (
            f"{side}: {model.total:,} parameters; {decoder.layers} layers of {decoder.hidden}, "
            f"vocabulary {model.vocab:,}, vision encoder {model.vision:,}"
        )
    yield f"Recalibrator: {load.recalibrator:,} parameters, {load.depth} blocks"


def flop_table(works: dict[str, Work]) -> Iterator[str]:
    """Show the TFLOP of a sample with a live teacher, and what a cache saves of them."""
    yield f"{'stage':<10}" + "".join(f"{name:>14}" for name in (*flops.PHASES, "whole"))
    for kind, work in works.items():
        counts = flops.of_stage(work.load, work.sample)
        whole = sum(counts.values())
        numbers = (*counts.values(), whole)
        yield f"{kind:<10}" + "".join(f"{number / 1e12:>14.2f}" for number in numbers)
        if work.load.kind.reads_cache:
            saved = counts["teacher"]
            yield f"  from a cache {whole / (whole - saved):.2f} times fewer"


def paper_table(loads: dict[tuple[str, str], Load]) -> Iterator[str]:
    """Show the paper's pairs by the same arithmetic, beside the paper's figures; loads by pair."""
    yield "forward ratio teacher : student, products with weights at equal token counts"
    for pair in PAPER_PAIRS:
        load = loads[pair]
        assert load.teacher is not None
        own = forward_ratio(load)
        theirs = PAPER_FORWARD[pair[0]] / PAPER_FORWARD[pair[1]]
        tokens = PAPER_FORWARD[pair[0]] * 1e12 / _plain(load, 1)
        counted = 2 * load.recalibrator * tokens / 1e12
        printed = PAPER_RECALIBRATOR[pair[1]]
        yield (
            f"  {pair[0]} : {pair[1]}  {own:.2f}, paper {theirs:.2f} ({own / theirs - 1:+.1%}); "
            f"Recalibrator at {tokens:,.0f} tokens {counted:.2f} TFLOP, paper {printed} "
            f"({counted / printed - 1:+.0%})"
        )
    peak = GPUS["a100-80g"].tflops
    teacher = PAPER_FORWARD[PAPER_PAIRS[1][0]]
    for kind, hours in PAPER_HOURS.items():
        rate = PAPER_SAMPLES[kind] * teacher / (PAPER_GPUS * hours * 3600)
        yield (
            f"  the paper's {hours} hours of {kind} imply {rate:,.0f} TFLOP/s a GPU for the "
            f"teacher's forward alone; an A100's peak is {peak:g}"
        )


def forward_ratio(load: Load) -> float:
    """FLOPs of decoder and head, without attention's own products and the vision encoder."""
    assert load.teacher is not None
    student = flops.weights_forward(load.student, 1) + flops.head_product(load.student, 1)
    return _plain(load, 1) / student


def _plain(load: Load, tokens: float) -> float:
    assert load.teacher is not None
    return flops.weights_forward(load.teacher, tokens) + flops.head_product(load.teacher, tokens)


def places(plans: dict[str, Plan | Misfit]) -> Iterator[str]:
    """Show one block for each placement of the teacher: whether it fits, and what it costs."""
    yield (
        f"{'teacher':<26}{'stage':<9}{'GPU GiB':>8}{'batch':>6}{'k':>4}{'GB/step in':>11}"
        f"{'step s':>8}{'hours':>8}  waits for"
    )
    for where, plan in plans.items():
        if isinstance(plan, Misfit):
            yield f"{where:<26}does not fit: {plan}"
            continue
        for kind, stage in plan.stages.items():
            load = stage.load
            yield (
                f"{where:<26}{kind:<9}{stage.memory.gpu / GIB:>8.1f}{load.micro_batch:>6}"
                f"{load.teacher_batches if load.teacher else '-':>4}"
                f"{stage.received / 1e9:>11.0f}"
                f"{stage.step.whole:>8.2f}{stage.hours:>8.1f}  {stage.step.limit}"
            )
            where = ""
        yield f"{'':<26}{'all':<9}{plan.hours:>45.1f}"


def chosen(plan: Plan) -> Iterator[str]:
    setting = plan.setting
    yield (
        f"teacher {setting.where}, {setting.forward_batches} micro-batches a forward; student "
        f"{'with' if setting.checkpointing else 'without'} gradient checkpointing, "
        f"{'offloaded' if setting.student_offload else 'on the GPUs'}: "
        f"{plan.hours:.1f} hours"
    )
    for kind, stage in plan.stages.items():
        yield f"{kind}: micro-batch {stage.load.micro_batch}, {stage.micro_steps} a step"
        for part in stage.memory.parts:
            place = part.place if part.place == "host" else f"gpu {part.phase}"
            yield f"  {part.name:<32} {part.bytes / GIB:>9.3f} GiB  {place:<12} {part.formula}"
        yield f"  peak of a GPU {stage.memory.gpu / GIB:.2f} GiB"
    yield f"an estimate: {NOT_COUNTED}"


def cache_size(work: Work) -> Iterator[str]:
    load = work.load
    assert load.teacher is not None
    # Beside the answer's rows the one before it; 4 bytes of a token's id.
    own = (work.sample.answer + 1) * (load.width * load.teacher.decoder.hidden + 4)
    yield (
        f"teacher.cache: {own / 1e6:.2f} MB a sample, {own * work.samples / 1e12:.2f} TB for "
        f"{work.samples:,.0f} samples"
    )


def scale(works: dict[str, Work], machine: Machine, per_host: int) -> Iterator[str]:
    """Show each placement on 8 to 8192 GPUs: the share kept of its smallest fit's GPU-hours."""
    first: dict[str, float] = {}
    yield f"{'teacher':<26}{'GPUs':>6}{'hours':>9}{'GPU-hours':>11}{'kept':>6}  limit"
    rows: dict[str, list[str]] = {}
    for gpus in SCALE:
        for where, plan in Search(at(works, gpus, per_host), machine).by_place().items():
            own = rows.setdefault(where, [])
            if isinstance(plan, Misfit):
                own.append(f"{where:<26}{gpus:>6}  {plan}")
                continue
            spent = plan.hours * gpus
            base = first.setdefault(where, spent)
            slowest = max(plan.stages, key=lambda kind: plan.stages[kind].hours)
            limit = f"{slowest}: {plan.stages[slowest].step.limit}"
            own.append(
                f"{where:<26}{gpus:>6}{plan.hours:>9.1f}{spent:>11.0f}{base / spent:>6.0%}  {limit}"
            )
    for where, lines in rows.items():
        if where in first:
            yield from lines
        else:
            yield f"{where:<26} never: {lines[-1][len(where) :].split(maxsplit=1)[1]}"


def smallest_changes(
    works: dict[str, Work], machine: Machine, gpus: int, per_host: int
) -> Iterator[str]:
    """List what, changed alone, makes the plan fit: more GPUs, larger GPUs, shorter samples."""
    for more in (count for count in SCALE if count > gpus):
        if Search(at(works, more, per_host), machine).best():
            yield f"--gpus {more}"
            break
    smaller = sorted(GPUS.items(), key=lambda item: item[1].gib)
    for name, gpu in smaller:
        is_larger = gpu.gib > machine.gpu.gib
        if is_larger and Search(works, machine._replace(gpu=gpu)).best():
            yield f"--gpu {name}"
            break
    longest = max(work.load.student_tokens for work in works.values())
    for length in (n for n in LENGTHS if n < longest):
        if Search(shorter(works, length), machine).best():
            yield f"--max-length {length}"
            break


def recipe_tree(plan: Plan, teacher: str, student: str, max_length: int) -> dict[str, Any]:
    """Turn the plan into a recipe; the user fills in the paths in capitals."""
    setting = plan.setting
    offload = "_offload" if setting.student_offload else ""
    batches = {
        kind: {
            "global_batch": stage.load.gpus * stage.load.micro_batch * stage.micro_steps,
            "micro_batch": stage.load.micro_batch,
        }
        for kind, stage in plan.stages.items()
    }
    tree: dict[str, Any] = {
        "run_dir": "runs/planned",
        "precision": "bf16",
        "teacher": {
            "path": teacher, "max_length": max_length, "placement": setting.placement,
            "forward_batches": setting.forward_batches,
        },
        "student": {
            "path": student, "max_length": max_length,
            "gradient_checkpointing": setting.checkpointing,
        },
        "data": {"train": "SHARDS", "num_workers": 4, "too_long": "drop"},
        "batch": batches["align"],
        "deepspeed": {"student": f"student_zero3{offload}"},
        "checkpoint": {"every": 100},
    }  # fmt: skip
    if setting.cache:
        tree["teacher"]["cache"] = "runs/teacher_rows"
    tree["stages"] = [{"kind": kind, "epochs": 1, **batches[kind]} for kind in plan.stages]
    return tree


def write_recipe(folder: Path, tree: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
