"""What each stage trains and how its learning rate falls: paper section 4 as one table."""

from typing import NamedTuple

from genrecal_ds.errors import UserError
from genrecal_ds.models.vlm import COMPONENTS, VLM
from genrecal_ds.recipe.config import OptimizerConfig
from genrecal_ds.recipe.stage_config import StageConfig


class StageFacts(NamedTuple):
    student: tuple[str, ...]  # components that train unless the recipe's `train:` says otherwise
    recalibrator: bool  # whether it exists, and trains


_ALL_BUT_VISION = tuple(component for component in COMPONENTS if component != "vision")

# Stage 2 leaves the input embeddings and the head alone, so that tied and untied students behave
# alike; gradients flow through the frozen head. Stage 3 trains all but the vision encoder, and so
# do the baselines.
STAGES: dict[str, StageFacts] = {
    "pretrain": StageFacts(COMPONENTS, recalibrator=False),
    "align": StageFacts((), recalibrator=True),
    "distill": StageFacts(("layers", "norm"), recalibrator=True),
    "sft": StageFacts(_ALL_BUT_VISION, recalibrator=False),
    "uld": StageFacts(_ALL_BUT_VISION, recalibrator=False),
    "logit_kd": StageFacts(_ALL_BUT_VISION, recalibrator=False),
    "mot": StageFacts(_ALL_BUT_VISION, recalibrator=False),
    "dskd": StageFacts(_ALL_BUT_VISION, recalibrator=False),
    "byte_kd": StageFacts(_ALL_BUT_VISION, recalibrator=False),
}


def trained_components(stage: StageConfig) -> tuple[str, ...]:
    """The student's components that train. Raises UserError for `train` in stage align."""
    if stage.train is None:
        return STAGES[stage.kind].student
    if stage.kind == "align":
        raise UserError(
            f"stages.{stage.name}.train: align trains the Recalibrator only; use kind distill"
        )
    return stage.train


def freeze(student: VLM, stage: StageConfig) -> None:
    """Set requires_grad on the student as the stage says."""
    student.train_only(trained_components(stage))


def learning_rate(
    step: int, num_steps: int, stage: StageConfig, optimizer: OptimizerConfig
) -> float:
    """Linear from lr at step 0 towards final_lr after the last step; no warm-up.

    A pure function of the step: nothing to save, nothing to restore.
    """
    start = stage.lr or optimizer.lr
    end = min(optimizer.final_lr, start) if stage.final_lr is None else stage.final_lr
    return end + (start - end) * (1.0 - step / num_steps)
