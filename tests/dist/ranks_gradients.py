"""Run on every rank: two optimizer steps of one stage, gradients caught before each update.

    ranks_gradients.py RECIPE STAGE OUT

Writes OUT (rank 0): weights before the second step, its gradients (full, summed over ranks), the
logits of the trained student on one batch, and whether sharded tensors were whole afterwards.
"""

import sys
from pathlib import Path

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_full_grad

from genrecal_ds import dist
from genrecal_ds.data.batch import to_device
from genrecal_ds.recipe.recipe_file import load_recipe
from genrecal_ds.training import engine
from genrecal_ds.training.build import build_stage
from genrecal_ds.training.inputs import open_inputs
from genrecal_ds.training.trainer import Trainer
from tests.dist.slots import steps_of


def full_weights(module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in module.named_parameters():
        with zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def main(recipe_path: str, stage_name: str, out: str) -> None:
    recipe = load_recipe(recipe_path)
    stage = next(stage for stage in recipe.stages if stage.name == stage_name)
    inputs = open_inputs(recipe)
    engine.start()
    parts = build_stage(recipe, stage, inputs, recipe.student.path, None)
    trainer = Trainer(recipe, stage, parts, {})
    result: dict = {"gradients": {}}

    update = parts.student.step
    num_calls = 0

    def catch_then_update() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:  # second step's last micro-batch
            for name, parameter in parts.student.module.named_parameters():
                if parameter.requires_grad:
                    result["gradients"][name] = safe_get_full_grad(parameter).clone()
        update()

    parts.student.step = catch_then_update
    for step, table in enumerate(steps_of(parts.dataset.reader.index)):
        if step == 1:
            result["weights"] = full_weights(parts.student.module)
        micro = [parts.dataset[slots] for slots in table[dist.rank() :: dist.world_size()]]
        report = trainer.train_step(step, [to_device(batch, trainer.device) for batch in micro])
    result["metrics"] = report.reduce()
    names = [name for name, p in parts.student.module.named_parameters() if engine.is_gathered(p)]
    result["still_whole"] = names

    batch = parts.dataset[tuple(steps_of(parts.dataset.reader.index)[0][0])]
    with torch.no_grad():
        student = parts.student.module.student
        inputs = batch.student.inputs
        hidden = student.body(*inputs)
        result["logits"] = student.head(hidden.flatten(0, 1)[batch.student.rows_M])
        tokens = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        result["inputs"] = {**tokens, **inputs.vision, "rows": batch.student.rows_M}
    parts.export(Path(out).parent / f"{stage_name}_export")
    if dist.is_main():
        torch.save(result, out)
    parts.close()
    dist.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
