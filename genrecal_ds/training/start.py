"""Starts a run on this rank: opens inputs, joins the ranks, checks devices."""

import os
import socket

import torch
import yaml

from genrecal_ds import dist
from genrecal_ds.console.redact import redact_tree
from genrecal_ds.errors import UserError
from genrecal_ds.estimate.describe import describe_blocks, freeze_map
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.hostfile import refuse_shared_devices
from genrecal_ds.training.inputs import open_inputs
from genrecal_ds.training.search_path import refuse_closed_folders


def dry_run(recipe: Recipe) -> None:
    """Print the resolved recipe and what each stage trains. Refuses bad tokenizers and shards."""
    open_inputs(recipe)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    for stage in recipe.stages:
        print(*freeze_map(recipe, stage), sep="\n")
    if any(stage.facts.has_recalibrator for stage in recipe.stages):
        print(f"recalibrator: {describe_blocks(recipe)}")


def train(recipe: Recipe, only: str | None, is_cache_only: bool) -> None:
    """Train all stages, or the stage named, or only write the teacher's rows; then leave."""
    inputs = open_inputs(recipe)  # refuses bad tokenizers and shards before DeepSpeed is imported

    from genrecal_ds.training import engine
    from genrecal_ds.training.run import fill_caches, run_recipe

    if not torch.cuda.is_available() and "LOCAL_SIZE" not in os.environ:  # as DeepSpeed asks
        refuse_closed_folders(os.environ.get("PATH", os.defpath))
    engine.start(recipe.faults.stall_seconds, recipe.run_dir / "logs")
    check_devices()
    torch.use_deterministic_algorithms(recipe.deterministic)
    if is_cache_only:
        fill_caches(recipe, inputs)
    else:
        if dist.is_main():
            _write_recipe(recipe)
        run_recipe(recipe, inputs, only)
    dist.leave()


def check_devices() -> None:
    """Check what only the ranks together can see. `deepspeed --hostfile` starts unchecked hosts."""
    stated = int(os.environ.get("WORLD_SIZE", 1))
    if dist.world_size() != stated:
        raise UserError(f"WORLD_SIZE is {stated}, {dist.world_size()} ranks met; check the hosts")
    if torch.cuda.is_available():
        device = str(torch.cuda.get_device_properties(dist.local_rank()).uuid)
        refuse_shared_devices(dist.gather_objects((socket.gethostname(), device)))


def _write_recipe(recipe: Recipe) -> None:
    (recipe.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    tree = redact_tree(recipe.model_dump(mode="json"))
    (recipe.run_dir / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
