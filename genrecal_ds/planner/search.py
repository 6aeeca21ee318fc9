"""Tries every arrangement on a machine: the fastest that fits, and why others do not.

A recipe has one arrangement for all its stages, and a micro-batch for each.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from genrecal_ds.estimate.flops import SampleTokens
from genrecal_ds.estimate.memory import GIB, Estimate, Load, Zero, estimate
from genrecal_ds.planner.cost import Machine, Step, micro_steps, step_seconds, wire
from genrecal_ds.recipe.config import Placement
from genrecal_ds.recipe.recipe_file import load_ds_config

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
SIZES = (1, 2, 4, 8, 16, 32)
MEMORY_USED = 0.95  # of a GPU's: an allocator leaves holes


class Setting(NamedTuple):
    """The recipe's keys that a plan chooses."""

    placement: Placement = "zero3"
    cache: bool = False
    checkpointing: bool = False
    student_offload: bool = False
    forward_batches: int = 1

    @property
    def where(self) -> str:
        return f"{self.placement}, then cache" if self.cache else self.placement


class Work(NamedTuple):
    """One stage's work: how many samples, and what it needs before anything is arranged."""

    load: Load
    samples: float
    global_batch: int
    sample: SampleTokens


@dataclass(frozen=True)
class StagePlan:
    load: Load
    memory: Estimate
    step: Step
    steps: float
    micro_steps: int

    @property
    def hours(self) -> float:
        return self.steps * self.step.whole / 3600

    @property
    def received(self) -> int:
        """Bytes that a rank receives in a step."""
        moved = wire(self.load)
        forwards = -(-self.micro_steps // self.load.teacher_batches)
        return forwards * moved.teacher + self.micro_steps * (moved.student + moved.reduced)

    @property
    def cost(self) -> tuple[float, float]:
        """What a plan minimises: time, and between equal times the traffic."""
        return round(self.hours, 3), self.received


@dataclass(frozen=True)
class Misfit:
    """The nearest that a stage came to fitting: the bytes needed and the bytes there."""

    kind: str
    place: Literal["gpu", "host", "batch"]
    needed: int
    there: float
    largest: str

    @property
    def over(self) -> float:
        return self.needed / self.there

    def __str__(self) -> str:
        if self.place == "batch":
            return f"{self.kind}: a global batch of {self.needed:,} does not divide by the GPUs"
        return (
            f"{self.kind}: a {self.place} needs {self.needed / GIB:.1f} of "
            f"{self.there / GIB:.1f} GiB, most of it for {self.largest}"
        )


@dataclass(frozen=True)
class Plan:
    setting: Setting
    stages: dict[str, StagePlan]

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages.values())

    @property
    def cost(self) -> tuple[float, float]:
        traffic = sum(stage.received * stage.steps for stage in self.stages.values())
        return round(self.hours, 2), traffic


def settings() -> Iterator[Setting]:
    flags = (False, True)
    counts = SIZES[:5]
    yield from itertools.starmap(
        Setting, itertools.product(PLACEMENTS, flags, flags, flags, counts)
    )


def arranged(work: Work, setting: Setting, micro_batch: int) -> Load:
    """Return the stage's load under a setting."""
    load = work.load
    if setting.student_offload:
        zero = Zero.of(load_ds_config("student_zero3_offload"))
        load = replace(load, student_zero=zero)
    load = replace(load, checkpointing=setting.checkpointing, micro_batch=micro_batch)
    if load.teacher is None:
        return load
    offload = "_offload" if setting.placement == "zero3_offload" else ""
    count = micro_steps(load, work.global_batch)
    return replace(
        load,
        placement="cache" if setting.cache and load.kind.reads_cache else setting.placement,
        teacher_zero=Zero.of(load_ds_config(f"teacher_zero3{offload}")),
        teacher_batches=min(setting.forward_batches, max(1, count)),
    )


class Search:
    """Finds plans for one machine; whatever no setting changes is calculated once."""

    def __init__(self, works: dict[str, Work], machine: Machine):
        self.works, self.machine = works, machine
        self._stage_plans: dict[tuple, StagePlan | Misfit] = {}

    def all(self) -> Iterator[Plan | tuple[Setting, Misfit]]:
        for setting in settings():
            stages: dict[str, StagePlan] = {}
            for kind in self.works:
                stage_plan = self.stage(kind, setting)
                if isinstance(stage_plan, Misfit):
                    yield setting, stage_plan
                    break
                stages[kind] = stage_plan
            else:
                yield Plan(setting, stages)

    def by_place(self) -> dict[str, Plan | Misfit]:
        """Find for each placement of the teacher the fastest plan, or the nearest misfit."""
        best: dict[str, Plan | Misfit] = {}
        for result in self.all():
            setting = result.setting if isinstance(result, Plan) else result[0]
            own, before = result if isinstance(result, Plan) else result[1], best.get(setting.where)
            if before is None or _is_better(own, before):
                best[setting.where] = own
        return best

    def best(self) -> Plan | None:
        plans = [result for result in self.all() if isinstance(result, Plan)]
        return min(plans, key=lambda plan: plan.cost, default=None)

    def stage(self, kind: str, setting: Setting) -> StagePlan | Misfit:
        """Find the fastest micro-batch that fits."""
        work = self.works[kind]
        own = setting if work.load.teacher else Setting(
            checkpointing=setting.checkpointing, student_offload=setting.student_offload
        )  # fmt: skip
        if not work.load.kind.reads_cache:
            own = own._replace(cache=False)
        if (kind, own) not in self._stage_plans:
            tried = [self._try(kind, arranged(work, own, size)) for size in SIZES]
            plans = [stage_plan for stage_plan in tried if isinstance(stage_plan, StagePlan)]
            self._stage_plans[kind, own] = (
                min(plans, key=lambda plan: plan.cost)
                if plans
                else min((m for m in tried if isinstance(m, Misfit)), key=lambda m: m.over)
            )
        return self._stage_plans[kind, own]

    def _try(self, kind: str, load: Load) -> StagePlan | Misfit:
        work, gpu = self.works[kind], self.machine.gpu
        count = micro_steps(load, work.global_batch)
        if not count:
            return Misfit(kind, "batch", work.global_batch, 1, "")
        memory, ranks = estimate(load), min(load.per_host, load.gpus)
        needs: dict[Literal["gpu", "host"], tuple[int, float]] = {
            "gpu": (memory.gpu, MEMORY_USED * gpu.gib * GIB),
            # A host of fewer than eight GPUs has its part of the memory.
            "host": (memory.host(ranks), gpu.host_gib * GIB * ranks / 8),
        }
        for place, (needed, there) in needs.items():
            if needed > there:
                return Misfit(kind, place, needed, there, memory.largest(place).name)
        step = step_seconds(load, work.sample, self.machine, work.global_batch)
        return StagePlan(load, memory, step, work.samples / work.global_batch, count)


def _is_better(own: Plan | Misfit, before: Plan | Misfit) -> bool:
    if isinstance(own, Plan) and isinstance(before, Plan):
        return own.cost < before.cost
    if isinstance(own, Misfit) and isinstance(before, Misfit):
        return own.over < before.over
    return isinstance(own, Plan)


def at(works: dict[str, Work], gpus: int, per_host: int) -> dict[str, Work]:
    """The same work on another number of GPUs."""
    return {
        kind: work._replace(load=replace(work.load, gpus=gpus, per_host=min(per_host, gpus)))
        for kind, work in works.items()
    }


def shorter(works: dict[str, Work], max_length: int) -> dict[str, Work]:
    """The same work with samples of at most so many tokens."""
    return {
        kind: work._replace(
            load=replace(
                work.load,
                student_tokens=min(work.load.student_tokens, max_length),
                teacher_tokens=min(work.load.teacher_tokens, max_length),
            )
        )
        for kind, work in works.items()
    }
