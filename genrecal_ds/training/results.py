"""Writes what a finished stage leaves: RUN/STAGE/student and a trained RUN/STAGE/recalibrator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from genrecal_ds import dist
from genrecal_ds.models.lora import merged
from genrecal_ds.models.recalibrator import save_recalibrator
from genrecal_ds.models.saving import write_student
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.training.engine import StudentEngine


def exporter(engine: StudentEngine, source: Path, recipe: Recipe) -> Callable[[Path], None]:
    """Return a collective that writes the result into a stage's folder. source: the folder that
    the stage's student came from. The collective raises UserError on every rank for a full disk."""

    def write(folder: Path, student: dict[str, Any], recalibrator: dict[str, Any]) -> None:
        write_student(engine.module.student.model, student, source, folder / "student")
        if recalibrator:
            assert recipe.teacher is not None
            facts = {
                "teacher": str(recipe.teacher.path),
                "depth": recipe.recalibrator.depth,
                "positions": recipe.recalibrator.positions,
            }
            save_recalibrator(recalibrator, folder / "recalibrator", facts)

    def export(folder: Path) -> None:
        student = engine.full_state("student.model.")
        recalibrator = engine.full_state("recalibrator.")
        scale = engine.module.student.adapter_scale
        if scale is not None:
            student = merged(student, scale)
        failure = None
        if dist.is_main():
            try:
                write(folder, student, recalibrator)
            except (OSError, SafetensorError) as error:  # a full disk, most likely
                failure = f"{folder}: {error}; the last checkpoint is whole, start again from it"
        dist.raise_together(failure)

    return export
