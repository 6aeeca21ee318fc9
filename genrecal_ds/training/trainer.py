"""Runs the training loop. Knows an objective and two engines by their interface, and no model.

for each step: fetch all micro-batches -> count rows over all ranks -> teacher rows, forward,
backward each -> update -> report
"""

import json
import math
import sys
import time
from typing import Any

import numpy as np
import torch

from genrecal_ds import dist
from genrecal_ds.data.batch import PairBatch, to_device
from genrecal_ds.data.loader import micro_batches
from genrecal_ds.data.plan import GivenSamples, StepPlan
from genrecal_ds.objectives.base import Totals
from genrecal_ds.objectives.report import Report
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
from genrecal_ds.training.schedule import learning_rate
from genrecal_ds.training.step_log import JsonlLog, Schedule, Warnings, finite, rates, token_counts
from genrecal_ds.training.teacher_cache import flushed, keep
from genrecal_ds.training.teacher_rows import teacher_rows, with_teacher_rows


class Trainer:
    """Trains one stage, from its start or a checkpoint to its exported result."""

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
        self.schedule = Schedule(recipe.log, self.num_steps)
        self.warnings = Warnings(stage.name)
        self.batch_read = 0  # digest of the samples of the step under way, over all ranks
        self.log = JsonlLog(self.folder / "metrics.jsonl")
        self.ledger = JsonlLog(self.folder / "ledger.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", recipe.checkpoint)
        self.device = dist.device()
        self.counts = SampleCounts(recipe.data.max_unreadable)
        self.faults = Faults(self.folder / "faults", recipe.faults, parts.dataset.reader)
        modules = {"student": parts.student.module}
        if parts.teacher is not None and parts.teacher.module is not None:
            modules["teacher"] = parts.teacher.module
        seconds = recipe.faults.stall_seconds
        self.watchdog = Watchdog(self.folder / "faults", seconds, parts.clock, modules)

    def run(self, resume: str = "auto") -> bool:
        """Train to the end and write the stage's result; False when asked to stop earlier.

        resume: a value of the recipe's key `resume`.
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
                self.parts.clock.precise = self.schedule.is_logged(step)
                with profiler.step(step):
                    with self.parts.clock.phase("data"):
                        micro = next(batches)
                    micro = self._with_own_answers(step, micro)
                    report = self.train_step(step, micro)
                self.next_step = step + 1
                self._enter_in_ledger(step)
                phases, seconds = self.parts.clock.take(), time.perf_counter() - start
                if self.schedule.is_logged(step):
                    record = self._measure(step, micro, report, phases, seconds)
                    record["metrics"] |= finite(self.evaluate(step))
                    self._log(record)
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
        """Run one optimizer step over this rank's micro-batches."""
        parts, clock = self.parts, self.parts.clock
        # Randomness (dropout of adapters) depends on the step alone: nothing to save or restore.
        torch.manual_seed(_seed(self.recipe.seed, step))
        totals = self._totals(step, micro)
        probe = self.schedule.is_probed(step)
        parts.student.set_lr(learning_rate(step, self.num_steps, self.stage, self.recipe.optimizer))
        parts.student.train()
        report, losses = Report(), []
        is_first_epoch = step - self.plan_start < parts.plan.steps_per_epoch  # every sample once
        with_rows = with_teacher_rows(
            micro, parts.teacher, parts.forward_batches,
            parts.dataset.encoders.vision_rules[0] or {}, clock, self.device,
        )  # fmt: skip
        for batch, rows in with_rows:
            if is_first_epoch and parts.writer and rows:
                with clock.phase("cache"):
                    keep(parts.writer, batch, *rows)
            loss, micro_report = parts.student(batch, rows, totals, probe)
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
        # The losses stay on the device and are read only when something is wrong.
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
        """Return real samples per slot of the step: below 1 only in the last step of an epoch."""
        plan = self.parts.plan
        return plan.num_real(step - self.plan_start) / plan.global_batch

    def _totals(self, step: int, micro: list[PairBatch]) -> Totals:
        """Count the loss rows of the whole step before its first forward: one collective.

        With these counts the mean does not depend on world size, micro-batch or packing. An
        incomplete batch is scaled by its share: else its few samples count for a whole batch.
        """
        with self.parts.clock.phase("agree"):
            wants_stop = stopping.reason(self.recipe.run_dir) is not None
            if self.parts.writer and self.parts.writer.failed:
                wants_stop = True  # all ranks together; the flush before the save gives the reason
            agreed = agree(step, micro, self.counts.of(micro), wants_stop)
        self.counts.add(agreed.sample_counts)
        self.stop_asked |= agreed.stop
        self.batch_read = agreed.batch
        share = self._share(step)
        rows = (agreed.teacher_rows, agreed.student_rows)
        return Totals(*(max(1.0, count) / share for count in rows))

    def _enter_in_ledger(self, step: int) -> None:
        """Check the step's samples against the plan, none lost and none twice, and note them."""
        planned = batch_digest(self.parts.plan.slots(step - self.plan_start))
        if self.batch_read != planned:
            raise RuntimeError(f"step {step + 1}: the ranks read other samples than planned")
        self.ledger.write({"step": step + 1, "batch": f"{planned:x}"})

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure losses and scores on held-out samples, on steps that are due. A collective."""
        scores = {}
        if self.schedule.is_validated(step):
            scores |= self.validate()
        if self.parts.answer and self.schedule.is_answered(step):
            self.parts.student.train(False)
            with self.parts.clock.phase("evaluation"):
                scores |= self.parts.answer()
        self.parts.clock.take()  # no part of the next step's time
        return scores

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Measure mean losses on the first validation samples, the same for any world size."""
        dataset = self.parts.validation
        if dataset is None:
            return {}
        unit = self.recipe.micro_batch(self.stage) * dist.world_size()
        index = dataset.reader.index
        plan = GivenSamples(np.arange(min(self.recipe.log.validation_samples, len(index))), unit)
        self.parts.student.train(False)
        totals, report = Totals(1, 1), Report()
        for micro in self._micro_batches(dataset, plan, 0, plan.steps_per_epoch):
            self.counts.of(micro)  # prints damaged samples; only training counts to the limit
            for batch in micro:
                batch = to_device(batch, self.device)
                rows = teacher_rows(self.parts.teacher, batch, self.parts.clock)
                _, part = self.parts.student(batch, rows, totals, False)
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

    def _measure(
        self,
        step: int,
        micro: list[PairBatch],
        report: Report,
        phases: dict[str, float],
        seconds: float,
    ) -> dict[str, Any]:
        """Build one step's line. A collective: sums and token counts are over all ranks."""
        metrics = report.reduce()
        norm, tokens = self.parts.student.gradient_norm, token_counts(micro)
        watched = {"loss": metrics.get("loss", 0.0), "gradient_norm": norm}
        spikes = self.faults.check_spikes(step, micro, watched)
        warnings = warnings_of(metrics, (step + 1) / self.num_steps)
        self.warnings.say(warnings)
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
            "batch_share": self._share(step),
            "skipped": self.faults.skipped,
            "spikes": spikes,
            "warnings": sorted(warnings),
        }

    def _log(self, record: dict[str, Any]) -> None:
        record |= {"peak_memory_gib": peak_memory_gib(), "left_out": self.counts.state()}
        self.log.write(record)
        self.parts.student.log(record["metrics"], record["samples"])

    def _checkpoint(self) -> None:
        """Save every checkpoint.every steps and before stopping."""
        every = self.recipe.checkpoint.every
        is_due = every and self.next_step % every == 0
        if (is_due or self.stop_asked) and self.next_step < self.num_steps:
            progress = {"plan_start": self.plan_start, "counts": self.counts.state()}
            self._flush_cache()  # rows are on disk before their steps count as done
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
    """Return another seed for every rank and step, within the range of torch's seeds."""
    return (seed * 0x9E3779B1 + step * dist.world_size() + dist.rank()) % 2**63
