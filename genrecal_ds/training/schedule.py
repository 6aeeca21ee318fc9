"""Computes the learning rate of a step."""

from genrecal_ds.recipe.config import OptimizerConfig
from genrecal_ds.recipe.stage_config import StageConfig


def learning_rate(
    step: int, num_steps: int, stage: StageConfig, optimizer: OptimizerConfig
) -> float:
    """Decay linearly from lr at step 0 towards final_lr after the last step; no warm-up.

    A pure function of the step: nothing to save, nothing to restore.
    """
    start = stage.lr or optimizer.lr
    end = min(optimizer.final_lr, start) if stage.final_lr is None else stage.final_lr
    return end + (start - end) * (1.0 - step / num_steps)
