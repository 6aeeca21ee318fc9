"""The loop. Knows an objective and two engines by their interface, and no model.

for each step: fetch all micro-batches -> count rows over all ranks -> teacher rows, forward,
backward each -> update -> report
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genrecal_ds import dist
from genrecal_ds.config import Recipe, StageConfig
from genrecal_ds.data.batch import PairBatch, to_device
from genrecal_ds.data.loader import micro_batches
from genrecal_ds.data.plan import FirstSamples, StepPlan
from genrecal_ds.errors import UserError
from genrecal_ds.metrics import JsonlLog, Report
from genrecal_ds.objectives import TeacherRows, Totals
from genrecal_ds.training.build import Inputs, StageParts, build_stage
from genrecal_ds.training.checkpoint import Checkpoints
from genrecal_ds.training.counts import SampleCounts
from genrecal_ds.training.progress import Profiler, Progress, peak_memory_gib
from genrecal_ds.training.stages import learning_rate


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
        self.log = JsonlLog(self.folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", recipe.checkpoint.keep)
        self.device = dist.device()
        self.counts = SampleCounts(recipe.data.max_unreadable)

    def run(self) -> None:
        """Train to the end and write the stage's result."""
        self._record_start()
        first_step = self._resume()
        self.log.keep_steps_before(first_step + 1)
        batches = self._micro_batches(
            self.parts.dataset,
            self.parts.plan,
            first_step - self.plan_start,
            self.num_steps - self.plan_start,
        )
        profiler = Profiler(self.recipe.profile, self.folder)
        with Progress(self.stage.name, first_step, self.num_steps) as progress:
            for step in range(first_step, self.num_steps):
                start = time.perf_counter()
                self.parts.clock.precise = self._is_logged(step)
                with profiler.step(step):
                    with self.parts.clock.phase("data"):
                        micro = [to_device(batch, self.device) for batch in next(batches)]
                    report = self.train_step(step, micro)
                record = self._record(step, micro, report, time.perf_counter() - start)
                if record:
                    self.log.write(record)
                    self.parts.student.log(record["metrics"], record["samples"])
                    progress.update(step + 1, record)
                self._checkpoint(step + 1)
        self._finish()

    def _record_start(self) -> None:
        if not dist.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "start.json").write_text(json.dumps(self.parts.facts, indent=2) + "\n")
        most = max(self.parts.facts["host_memory_gib"])
        print(f"{self.stage.name}: models loaded; host memory of a rank at most {most:.2f} GiB")

    def train_step(self, step: int, micro: list[PairBatch]) -> Report:
        """One optimizer step over this rank's micro-batches."""
        parts, clock = self.parts, self.parts.clock
        totals = self._totals(micro, self._share(step))
        every = self.recipe.log.gradient_norms_every
        probe = bool(every) and step % every == 0
        parts.student.set_lr(learning_rate(step, self.num_steps, self.stage, self.recipe.optimizer))
        parts.student.train()
        report = Report()
        for batch in micro:
            teacher_rows = self._teacher_rows(batch)
            loss, micro_report = parts.student(batch, teacher_rows, totals, probe)
            with clock.phase("backward"):
                parts.student.backward(loss)
            with clock.phase("optimizer"):
                parts.student.step()
            # Parts of one sum, not samples of a mean: the counts of a step add up to 1.
            share = loss.new_tensor(1.0 / (len(micro) * dist.world_size()))
            micro_report.means["loss"] = (loss.detach(), share)
            report = report + micro_report
        return report

    def _share(self, step: int) -> float:
        """Real samples of the step per slot: below 1 in the last step of an epoch only."""
        plan = self.parts.plan
        return plan.num_real(step - self.plan_start) / plan.global_batch

    def _totals(self, micro: Sequence[PairBatch], share: float) -> Totals:
        """Loss rows of the whole step, before its first forward: one collective.

        Known up front, the mean does not depend on world size, micro-batch or packing. An
        incomplete batch is scaled by its share, or its few samples would count for a whole one.
        """
        rows = [
            sum(batch.num_teacher_rows for batch in micro),
            sum(batch.num_student_rows for batch in micro),
        ]
        counts = torch.tensor(rows + self.counts.of(micro), dtype=torch.float64)
        teacher, student, *samples = dist.sum_over_ranks(counts.to(self.device)).tolist()
        self.counts.add(samples)
        return Totals(max(1.0, teacher) / share, max(1.0, student) / share)

    def _teacher_rows(self, batch: PairBatch) -> TeacherRows | None:
        if self.parts.teacher is None:
            return None
        assert batch.teacher is not None
        with self.parts.clock.phase("teacher"):
            rows = self.parts.teacher(
                batch.teacher.inputs, batch.teacher.rows_A, batch.teacher.targets_N
            )
        return TeacherRows(*rows)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses on the first validation samples, the same for any world size."""
        dataset = self.parts.validation
        if dataset is None:
            return {}
        unit = self.recipe.micro_batch(self.stage) * dist.world_size()
        index = dataset.reader.index
        plan = FirstSamples(min(self.recipe.log.validation_samples, len(index)), unit)
        self.parts.student.train(False)
        report = Report()
        for micro in self._micro_batches(dataset, plan, 0, plan.steps_per_epoch):
            self.counts.of(micro)  # names damaged ones; only training counts towards the limit
            for batch in micro:
                batch = to_device(batch, self.device)
                _, part = self.parts.student(batch, self._teacher_rows(batch), Totals(1, 1), False)
                report = report + part
        return {f"validation/{name}": value for name, value in report.reduce().items()}

    def _micro_batches(self, dataset: Any, plan: StepPlan | FirstSamples, first: int, last: int):
        return micro_batches(
            dataset, plan, first_step=first, last_step=last,
            rank=dist.rank(), world_size=dist.world_size(),
            micro_batch=self.recipe.micro_batch(self.stage),
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def _is_logged(self, step: int) -> bool:
        return (step + 1) % self.recipe.log.every == 0 or step + 1 == self.num_steps

    def _record(
        self, step: int, micro: list[PairBatch], report: Report, seconds: float
    ) -> dict[str, Any]:
        """One step's line; {} on steps that are not logged. A collective on the others."""
        phases = self.parts.clock.take()
        validates = self.recipe.log.validate_every
        is_validated = (validates and (step + 1) % validates == 0) or step + 1 == self.num_steps
        if not (self._is_logged(step) or is_validated):
            return {}
        metrics = report.reduce()
        if is_validated:
            metrics |= self.validate()
            self.parts.clock.take()
        tokens = self._token_counts(micro)
        return {
            "step": step + 1,
            "samples": (step + 1) * self.parts.plan.global_batch,
            "world_size": dist.world_size(),
            "lr": learning_rate(step, self.num_steps, self.stage, self.recipe.optimizer),
            "gradient_norm": self.parts.student.gradient_norm,
            "metrics": metrics,
            "seconds": round(seconds, 4),
            "phases": {name: round(value, 4) for name, value in phases.items()},
            "tokens": tokens,
            "tokens_per_second": _rates(tokens, phases, seconds),
            "peak_memory_gib": peak_memory_gib(),
            "batch_share": self._share(step),
            "left_out": self.counts.state(),
        }

    def _token_counts(self, micro: list[PairBatch]) -> dict[str, int]:
        counts = torch.tensor(
            [
                sum(int(b.student.inputs.attention_mask.sum()) for b in micro),
                sum(int(b.teacher.inputs.attention_mask.sum()) for b in micro if b.teacher),
                sum(len(b.teacher.packing.source_P) for b in micro if b.teacher),
                sum(b.num_samples for b in micro),
            ],
            dtype=torch.float64,
        )
        values = dist.sum_over_ranks(counts.to(self.device)).long().tolist()
        return dict(zip(("student", "teacher", "packed", "samples"), values, strict=True))

    def _checkpoint(self, next_step: int) -> None:
        every = self.recipe.checkpoint.every
        if every and next_step % every == 0 and next_step < self.num_steps:
            progress = {"plan_start": self.plan_start, "counts": self.counts.state()}
            self.checkpoints.save(self.parts.student, next_step, {**self.facts, **progress})

    def _resume(self) -> int:
        path = self.checkpoints.latest() if self.recipe.resume != "never" else None
        if path is None:
            return 0
        may_differ = ("data", "plan") if self.recipe.resume == "new_data" else ()
        manifest = self.checkpoints.load(self.parts.student, path, self.facts, may_differ)
        step = manifest["step"]
        is_same = all(manifest.get(key) == self.facts[key] for key in ("data", "plan"))
        self.plan_start = manifest.get("plan_start", 0) if is_same else step
        self.counts.load(manifest.get("counts", {}))
        if dist.is_main():
            began = "" if is_same else ", and began an epoch of the new data there"
            print(f"{self.stage.name}: resumed at step {step} from {path}{began}")
        return step

    def _finish(self) -> None:
        self.parts.export(self.folder)
        if dist.is_main():
            done = {**self.facts, "steps": self.num_steps, "left_out": self.counts.state()}
            done["reasons_on_rank_0"] = dict(self.counts.reasons.most_common())
            (self.folder / "DONE").write_text(json.dumps(done, indent=2) + "\n")
        dist.barrier()


def _rates(tokens: dict[str, int], phases: dict[str, float], seconds: float) -> dict[str, float]:
    """Tokens per second over all ranks in each phase's own time, and overall."""
    of_phase = {"teacher": "teacher", "student": "student", "recalibrator": "packed"}
    rates = {
        phase: tokens[kind] / phases[phase] for phase, kind in of_phase.items() if phases.get(phase)
    }
    rates["step"] = (tokens["student"] + tokens["teacher"]) / seconds
    return {name: round(rate, 1) for name, rate in rates.items()}


def run_recipe(recipe: Recipe, inputs: Inputs) -> None:
    """All stages in order; finished ones are skipped. Engines are freed in between."""
    for stage in recipe.stages:
        folder = recipe.run_dir / stage.name
        lora = recipe.student.lora
        facts = {
            "stage": stage.name,
            "stage_hash": stage_hash(recipe, stage),
            "student": str(_source(recipe, recipe.student_source(stage), "student")),
            "adapter_scale": lora.alpha / lora.rank if lora else None,
        }
        if _is_done(folder, facts, recipe):
            continue
        recalibrator = recipe.recalibrator_source(stage)
        parts = build_stage(
            recipe,
            stage,
            inputs,
            Path(facts["student"]),
            _source(recipe, recalibrator, "recalibrator") if recalibrator else None,
        )
        Trainer(recipe, stage, parts, facts).run()
        parts.close()


def stage_hash(recipe: Recipe, stage: StageConfig) -> str:
    """Identifies what decides a stage's result; logging and paths of outputs do not."""
    # Shards are known by their content (facts["data"]), not by their place.
    outputs = {"run_dir", "stages", "log", "checkpoint", "resume", "profile", "data"}
    tree = recipe.model_dump(mode="json", exclude=outputs) | {"too_long": recipe.data.too_long}
    text = json.dumps([tree, stage.model_dump(mode="json", exclude={"data"})], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(recipe: Recipe, source: str, kind: str) -> Path:
    """A folder named in the recipe, or `stage:NAME` as that stage's result of this kind."""
    if source.startswith("stage:"):
        return recipe.run_dir / source.removeprefix("stage:") / kind
    return Path(source)


def _is_done(folder: Path, facts: dict[str, Any], recipe: Recipe) -> bool:
    """Raises UserError when the folder holds the result of another recipe."""
    marker = folder / "DONE"
    if recipe.resume == "never" or not marker.is_file():
        return False
    if json.loads(marker.read_text())["stage_hash"] != facts["stage_hash"]:
        raise UserError(
            f"{marker}: stage {facts['stage']} was finished with other settings; "
            "name another run_dir, or remove the folder to train it again"
        )
    if dist.is_main():
        print(f"{facts['stage']}: already finished ({folder})")
    return True
