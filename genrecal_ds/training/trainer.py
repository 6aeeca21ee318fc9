"""The loop. Knows an objective and two engines by their interface, and no model.

for each step: fetch all micro-batches -> count rows over all ranks -> teacher rows, forward,
backward each -> update -> report
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch, join_teacher, to_device
from genrecal_ds.data.loader import micro_batches
from genrecal_ds.data.pair import side_of
from genrecal_ds.data.plan import GivenSamples, StepPlan
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.objectives.report import JsonlLog, Report
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.build import StageParts
from genrecal_ds.training.checkpoint import Checkpoints
from genrecal_ds.training.guards import stopping
from genrecal_ds.training.guards.agreement import agree, batch_digest
from genrecal_ds.training.guards.counts import SampleCounts
from genrecal_ds.training.guards.faults import Faults
from genrecal_ds.training.guards.health import warnings_of
from genrecal_ds.training.guards.watchdog import Watchdog
from genrecal_ds.training.manifest import write_atomically
from genrecal_ds.training.progress import Profiler, Progress, peak_memory_gib
from genrecal_ds.training.records import finite, rates, token_counts
from genrecal_ds.training.stages import learning_rate
from genrecal_ds.training.teacher_cache import flushed, keep


class Trainer:
    """One stage, from its start or a checkpoint to its exported result."""

    def __init__(
        self, recipe: Recipe, stage: StageConfig, parts: StageParts, facts: dict[str, Any]
    ):
        self.recipe, self.stage, self.parts = recipe, stage, parts
        self.folder = recipe.run_dir / stage.name
        self.num_steps = stage.steps or math.ceil((stage.epochs or 0) * parts.plan.steps_per_epoch)
        self.facts = {
            **facts,
            "data": parts.dataset.reader.index.fingerprint,
            "plan": parts.plan.order.facts,
        }
        self.plan_start = 0  # the step at which the current data's first epoch began
        self.next_step = 0
        self.stop_asked = False
        self.warned: set[str] = set()
        self.batch_read = 0  # digest of the samples of the step under way, over all ranks
        self.log = JsonlLog(self.folder / "metrics.jsonl")
        self.ledger = JsonlLog(self.folder / "ledger.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", recipe.checkpoint)
        self.device = dist.device()
        self.counts = SampleCounts(recipe.data.max_unreadable)
        self.faults = Faults(self.folder / "faults", recipe.faults, parts.dataset.reader)
        modules = {"student": parts.student.module}
        for number, teacher in enumerate(parts.teachers):
            if teacher.module is not None:
                modules[side_of(number)] = teacher.module
        seconds = recipe.faults.stall_seconds
        self.watchdog = Watchdog(self.folder / "faults", seconds, parts.clock, modules)

    def run(self, resume: str = "auto") -> bool:
        """Train to the end and write the stage's result; False when asked to stop before.

        resume: as the recipe's key.
        """
        self._record_start()
        self.next_step = first_step = self._resume(resume)
        for log in (self.log, self.ledger):
            log.keep_steps_before(first_step + 1)
        batches = self._micro_batches(
            self.parts.dataset,
            self.parts.plan,
            first_step - self.plan_start,
            self.num_steps - self.plan_start,
        )
        profiler = Profiler(self.recipe.profile, self.folder)
        with self.watchdog, Progress(self.stage.name, first_step, self.num_steps) as progress:
            while self.next_step < self.num_steps:
                step, start = self.next_step, time.perf_counter()
                self.watchdog.step = step
                self.parts.clock.precise = self._is_logged(step)
                with profiler.step(step):
                    with self.parts.clock.phase("data"):
                        micro = next(batches)
                    micro = self._with_own_answers(step, micro)
                    report = self.train_step(step, micro)
                self.next_step = step + 1
                self._enter_in_ledger(step)
                record = self._record(step, micro, report, time.perf_counter() - start)
                if record:
                    self.log.write(record)
                    self.parts.student.log(record["metrics"], record["samples"])
                    progress.update(step + 1, record)
                self._checkpoint()
                if self.stop_asked and self.next_step < self.num_steps:
                    return False
            self._finish()
        return True

    def _record_start(self) -> None:
        if not dist.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        start = {**self.parts.facts, "steps": self.num_steps, "world_size": dist.world_size()}
        (self.folder / "start.json").write_text(json.dumps(start, indent=2) + "\n")
        most = max(self.parts.facts["host_memory_gib"])
        print(f"{self.stage.name}: models loaded; host memory of a rank at most {most:.2f} GiB")

    def train_step(self, step: int, micro: list[PairBatch]) -> Report:
        """One optimizer step over this rank's micro-batches."""
        parts, clock = self.parts, self.parts.clock
        # Randomness (dropout of adapters) is a function of the step: nothing to save or restore.
        torch.manual_seed(_seed(self.recipe.seed, step))
        totals = self._totals(step, micro)
        probe = self._is_due(self.recipe.log.probes_every, step)
        parts.student.set_lr(learning_rate(step, self.num_steps, self.stage, self.recipe.optimizer))
        parts.student.train()
        report, losses = Report(), []
        is_first_epoch = step - self.plan_start < parts.plan.steps_per_epoch  # every sample once
        for batch, teacher_rows in self._with_teacher(micro):
            if is_first_epoch and parts.writer and teacher_rows:
                with clock.phase("cache"):
                    keep(parts.writer, batch, *teacher_rows)
            loss, micro_report = parts.student(batch, teacher_rows, totals, probe)
            with clock.phase("backward"):
                parts.student.backward(loss)
            with clock.phase("optimizer"):
                parts.student.step()
            losses.append(loss.detach())
            # Parts of one sum, not samples of a mean: the counts of a step add up to 1.
            share = loss.new_tensor(1.0 / (len(micro) * dist.world_size()))
            micro_report.means["loss"] = (loss.detach(), share)
            report = report + micro_report
        is_applied = parts.student.is_applied
        # The losses wait on the device: looked at only when something is wrong.
        shown = [] if is_applied else torch.stack(losses).tolist()
        self.faults.check_step(step, micro, shown, is_applied)
        return report

    def _with_own_answers(self, step: int, micro: list[PairBatch]) -> list[PairBatch]:
        if self.parts.own_answers is None:
            return micro
        self.parts.student.train(False)
        with self.parts.clock.phase("on_policy"):
            return self.parts.own_answers(step, micro)

    def _share(self, step: int) -> float:
        """Real samples of the step per slot: below 1 in the last step of an epoch only."""
        plan = self.parts.plan
        return plan.num_real(step - self.plan_start) / plan.global_batch

    def _totals(self, step: int, micro: list[PairBatch]) -> Totals:
        """Loss rows of the whole step, before its first forward: one collective.

        Known up front, the mean does not depend on world size, micro-batch or packing. An
        incomplete batch is scaled by its share, or its few samples would count for a whole one.
        """
        with self.parts.clock.phase("agree"):
            wants_stop = stopping.reason(self.recipe.run_dir) is not None
            if self.parts.writer and self.parts.writer.failed:
                wants_stop = True  # all ranks together; the flush before the save says why
            agreed = agree(step, micro, self.counts.of(micro), wants_stop)
        self.counts.add(agreed.sample_counts)
        self.stop_asked |= agreed.stop
        self.batch_read = agreed.batch
        share = self._share(step)
        teacher, student, *more = (
            max(1.0, rows) / share
            for rows in (agreed.teacher_rows, agreed.student_rows, *agreed.more_rows)
        )
        return Totals(teacher, student, tuple(more))

    def _enter_in_ledger(self, step: int) -> None:
        """Which samples the step trained on, checked against the plan: none lost, none twice."""
        planned = batch_digest(self.parts.plan.slots(step - self.plan_start))
        if self.batch_read != planned:
            raise RuntimeError(f"step {step + 1}: the ranks read other samples than planned")
        self.ledger.write({"step": step + 1, "batch": f"{planned:x}"})

    def _teacher_rows(self, batch: PairBatch) -> TeacherRows | tuple[TeacherRows, ...] | None:
        """A tuple only where there are several teachers."""
        found = []
        for number, teacher in enumerate(self.parts.teachers):
            view = batch.seen_by(number).teacher
            assert view is not None
            with self.parts.clock.phase("teacher"):
                found.append(TeacherRows(*teacher(view.inputs, view.rows_A, view.targets_N)))
        return tuple(found) if len(found) > 1 else next(iter(found), None)

    def _with_teacher(
        self, micro: list[PairBatch]
    ) -> Iterator[tuple[PairBatch, TeacherRows | tuple[TeacherRows, ...] | None]]:
        """The micro-batches with their teacher rows, several of which come from one forward.

        On the device from here on, and no longer than needed: a step's pictures are gigabytes.
        """
        source = self.recipe.teacher
        count = source.forward_batches if source else 1
        if self.parts.teacher is None or count == 1:
            for batch in micro:
                batch = to_device(batch, self.device)
                yield batch, self._teacher_rows(batch)
            return
        rules = self.parts.dataset.encoders.vision_rules[0] or {}
        for first in range(0, len(micro), count):
            batches = [to_device(batch, self.device) for batch in micro[first : first + count]]
            with self.parts.clock.phase("teacher"):
                joined = join_teacher(batches, rules)
                rows, targets = self.parts.teacher(*joined[:3])
                parts = zip(
                    batches,
                    rows.split([size for size, _ in joined.sizes]),
                    targets.split([size for _, size in joined.sizes]),
                    strict=True,
                )
            for batch, inputs_AH, targets_NH in parts:
                yield batch, TeacherRows(inputs_AH, targets_NH)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses on the first validation samples, the same for any world size."""
        dataset = self.parts.validation
        if dataset is None:
            return {}
        unit = self.recipe.micro_batch(self.stage) * dist.world_size()
        index = dataset.reader.index
        plan = GivenSamples(np.arange(min(self.recipe.log.validation_samples, len(index))), unit)
        self.parts.student.train(False)
        totals = Totals(1, 1, (1,) * len(self.parts.more_teachers))
        report = Report()
        for micro in self._micro_batches(dataset, plan, 0, plan.steps_per_epoch):
            self.counts.of(micro)  # names damaged ones; only training counts towards the limit
            for batch in micro:
                batch = to_device(batch, self.device)
                _, part = self.parts.student(batch, self._teacher_rows(batch), totals, False)
                report = report + part
        return {f"validation/{name}": value for name, value in report.reduce().items()}

    def _micro_batches(self, dataset: Any, plan: StepPlan | GivenSamples, first: int, last: int):
        return micro_batches(
            dataset, plan, first_step=first, last_step=last,
            rank=dist.rank(), world_size=dist.world_size(),
            micro_batch=self.recipe.micro_batch(self.stage),
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def _is_logged(self, step: int) -> bool:
        log = self.recipe.log
        is_due = self._is_due(log.every, step) or self._is_due(log.probes_every, step)
        return is_due or step + 1 == self.num_steps

    @staticmethod
    def _is_due(every: int, step: int) -> bool:
        return bool(every) and (step + 1) % every == 0

    def _warn(self, warnings: dict[str, str]) -> None:
        """Each once in a stage."""
        if dist.is_main():
            for name in warnings.keys() - self.warned:
                print(f"{self.stage.name}: warning: {warnings[name]}", file=sys.stderr, flush=True)
        self.warned |= warnings.keys()

    def _record(
        self, step: int, micro: list[PairBatch], report: Report, seconds: float
    ) -> dict[str, Any]:
        """One step's line; {} on steps that are not logged. A collective on the others."""
        phases = self.parts.clock.take()
        log, is_last = self.recipe.log, step + 1 == self.num_steps
        is_validated = self._is_due(log.validate_every, step) or is_last
        answer = self.parts.answer
        is_answered = answer and (self._is_due(log.evaluate_every, step) or is_last)
        if not (self._is_logged(step) or is_validated or is_answered):
            return {}
        metrics = report.reduce()
        norm, tokens = self.parts.student.gradient_norm, token_counts(micro)
        watched = {"loss": metrics.get("loss", 0.0), "gradient_norm": norm}
        spikes = self.faults.check_spikes(step, micro, watched)
        warnings = warnings_of(metrics, (step + 1) / self.num_steps)
        self._warn(warnings)
        if is_validated:
            metrics |= self.validate()
        if answer and is_answered:
            self.parts.student.train(False)
            with self.parts.clock.phase("evaluation"):
                metrics |= answer()
        self.parts.clock.take()
        return {
            "step": step + 1,
            "samples": (step + 1) * self.parts.plan.global_batch,
            "world_size": dist.world_size(),
            "lr": learning_rate(step, self.num_steps, self.stage, self.recipe.optimizer),
            **finite({"gradient_norm": norm}),
            "metrics": finite(metrics),
            "seconds": round(seconds, 4),
            "phases": {name: round(value, 4) for name, value in phases.items()},
            "tokens": tokens,
            "tokens_per_second": rates(tokens, phases, seconds),
            "peak_memory_gib": peak_memory_gib(),
            "batch_share": self._share(step),
            "left_out": self.counts.state(),
            "skipped": self.faults.skipped,
            "spikes": spikes,
            "warnings": sorted(warnings),
        }

    def _checkpoint(self) -> None:
        """Every so many steps, and before stopping."""
        every = self.recipe.checkpoint.every
        is_due = every and self.next_step % every == 0
        if (is_due or self.stop_asked) and self.next_step < self.num_steps:
            progress = {"plan_start": self.plan_start, "counts": self.counts.state()}
            self._flush_cache()  # what the steps up to here gave is there before they count as done
            with self.parts.clock.phase("checkpoint"):
                facts = {**self.facts, **progress}
                self.checkpoints.save(self.parts.student, self.next_step, facts)

    def _resume(self, resume: str) -> int:
        path = self.checkpoints.find(resume) if resume != "never" else None
        self.checkpoints.set_aside(newer_than=path)
        if path is None:
            if dist.is_main():
                print(f"{self.stage.name}: no checkpoint, starts at step 0", file=sys.stderr)
            return 0
        may_differ = ("data", "plan") if resume == "new_data" else ()
        manifest = self.checkpoints.load(self.parts.student, path, self.facts, may_differ)
        step = manifest["step"]
        is_same = all(manifest.get(key) == self.facts[key] for key in ("data", "plan"))
        self.plan_start = manifest.get("plan_start", 0) if is_same else step
        self.counts.load(manifest.get("counts", {}))
        if dist.is_main():
            began = "" if is_same else ", and began an epoch of the new data there"
            before, now = manifest["world_size"], dist.world_size()
            moved = "" if before == now else f", written by {before} ranks, by {now} now"
            print(f"{self.stage.name}: resumed at step {step} from {path}{moved}{began}")
        return step

    def _flush_cache(self) -> None:
        if self.parts.writer:
            with self.parts.clock.phase("cache"):
                dist.raise_together(flushed(self.parts.writer))

    def _finish(self) -> None:
        self._flush_cache()
        with self.parts.clock.phase("export"):
            self.parts.export(self.folder)
        if dist.is_main():
            done = {**self.facts, "steps": self.num_steps, "left_out": self.counts.state()}
            done["reasons_on_rank_0"] = dict(self.counts.reasons.most_common())
            write_atomically(self.folder / "DONE", json.dumps(done, indent=2) + "\n")
        dist.barrier()


def _seed(seed: int, step: int) -> int:
    """Another on every rank and step: a multiplier that mixes, and what torch's seeds hold."""
    return (seed * 0x9E3779B1 + step * dist.world_size() + dist.rank()) % 2**63
