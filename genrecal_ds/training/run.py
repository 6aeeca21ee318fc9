"""Runs a recipe's stages in order. Marker files say how the run ended: launchers lose exit codes.

RUN/DONE        every stage is finished
RUN/STOPPED     the run was asked to stop and can go on; the file says why and where
"""

import hashlib
import json
import time
from pathlib import Path

from genrecal_ds import dist
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.stage_config import StageConfig
from genrecal_ds.training.build import build_stage
from genrecal_ds.training.guards import stopping
from genrecal_ds.training.inputs import Inputs
from genrecal_ds.training.manifest import write_atomically
from genrecal_ds.training.stage_data import fill_cache
from genrecal_ds.training.trainer import Trainer

DONE, STOPPED = "DONE", "STOPPED"


def run_recipe(recipe: Recipe, inputs: Inputs, only: str | None = None) -> bool:
    """Train the stages, or only the one named. Skip finished stages, free engines in between.

    Returns False when the run was asked to stop before the end.
    """
    if dist.is_main():
        for name in (DONE, STOPPED):  # left by an earlier start
            (recipe.run_dir / name).unlink(missing_ok=True)
    dist.barrier()
    resume = recipe.resume
    for stage in recipe.stages:
        if only not in (None, stage.name) or _is_done(recipe, stage):
            continue
        if not run_stage(recipe, stage, inputs, resume):
            return False
        if resume not in ("never", "new_data"):
            resume = "auto"  # a named checkpoint belongs to the first unfinished stage
    if dist.is_main() and all((recipe.run_dir / s.name / DONE).is_file() for s in recipe.stages):
        write_atomically(recipe.run_dir / DONE, json.dumps({"time": time.time()}) + "\n")
    return True


def fill_caches(recipe: Recipe, inputs: Inputs) -> None:
    """Write only the teacher's rows, for the stages that read them: the teacher can thus run at
    another time and place. Raises UserError when no stage reads them."""
    reading = [stage for stage in recipe.stages if recipe.reads_cache(stage)]
    if not reading:
        raise UserError("--cache-only: no distill stage with a teacher.cache; name a folder")
    for stage in reading:
        fill_cache(recipe, stage, inputs)


def run_stage(recipe: Recipe, stage: StageConfig, inputs: Inputs, resume: str) -> bool:
    """Run one stage; return False when it was asked to stop."""
    lora = recipe.student.lora
    facts = {
        "stage": stage.name,
        "stage_hash": stage_hash(recipe, stage),
        "student": str(_source(recipe, recipe.student_source(stage), "student")),
        "adapter_scale": lora.alpha / lora.rank if lora else None,
    }
    recalibrator = recipe.recalibrator_source(stage)
    parts = build_stage(
        recipe,
        stage,
        inputs,
        Path(facts["student"]),
        _source(recipe, recalibrator, "recalibrator") if recalibrator else None,
    )
    trainer = Trainer(recipe, stage, parts, facts)
    is_finished = trainer.run(resume)
    parts.close()
    is_last = is_finished and stage is recipe.stages[-1]
    if trainer.stop_asked and not is_last:
        _mark_stopped(recipe, stage, trainer)
        return False
    return True


def _mark_stopped(recipe: Recipe, stage: StageConfig, trainer: Trainer) -> None:
    why = next(filter(None, dist.gather_objects(stopping.reason(recipe.run_dir))), "a signal")
    if dist.is_main():
        (recipe.run_dir / stopping.STOP_FILE).unlink(missing_ok=True)  # it has been heeded
        place = {"stage": stage.name, "step": trainer.next_step, "why": why, "time": time.time()}
        write_atomically(recipe.run_dir / STOPPED, json.dumps(place) + "\n")
        where = f"{stage.name}: stopped by {why} after step {trainer.next_step}"
        print(f"{where}; start it again to go on", flush=True)
    dist.barrier()


def stage_hash(recipe: Recipe, stage: StageConfig) -> str:
    """Hash what decides a stage's result; logging and paths of outputs do not decide it."""
    # The content of shards identifies them (facts["data"]), not their place.
    names = (
        "run_dir", "stages", "log", "checkpoint", "faults", "resume", "profile", "data",
    )  # fmt: skip
    # A cache holds the same rows that the teacher gives: the folder of the cache decides nothing.
    outputs = dict.fromkeys(names, True) | {"teacher": {"cache": True}}
    tree = recipe.model_dump(mode="json", exclude=outputs) | {"too_long": recipe.data.too_long}
    text = json.dumps([tree, stage.model_dump(mode="json", exclude={"data"})], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(recipe: Recipe, source: str, kind: str) -> Path:
    """Resolve a folder named in the recipe, or `stage:NAME` to that stage's result of this kind."""
    if source.startswith("stage:"):
        return recipe.run_dir / source.removeprefix("stage:") / kind
    return Path(source)


def _is_done(recipe: Recipe, stage: StageConfig) -> bool:
    """Return True if finished. Raises UserError when the folder holds another recipe's result."""
    folder = recipe.run_dir / stage.name
    marker = folder / DONE
    if recipe.resume == "never" or not marker.is_file():
        return False
    if json.loads(marker.read_text())["stage_hash"] != stage_hash(recipe, stage):
        raise UserError(
            f"{marker}: stage {stage.name} was finished with other settings; "
            "name another run_dir, or remove the folder to train it again"
        )
    if dist.is_main():
        print(f"{stage.name}: already finished ({folder})")
    return True
