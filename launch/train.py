"""Run a recipe's stages.

deepspeed --num_accelerators 2 launch/train.py RECIPE.yaml [key=value ...]
deepspeed --hostfile HOSTS launch/train.py RECIPE.yaml [key=value ...]
deepspeed launch/train.py RECIPE.yaml --hostfile HOSTS [key=value ...]
torchrun --nproc_per_node 2 launch/train.py RECIPE.yaml [key=value ...]
python launch/train.py RECIPE.yaml --dry-run
"""

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from genrecal_ds.config import Recipe, check_folders, load_recipe  # noqa: E402
from genrecal_ds.errors import UserError  # noqa: E402

TORCH_RANGE = ((2, 11), (2, 15))  # as in setup.py


def main(argv: list[str] | None = None) -> int:
    """0 done, 2 a mistake of the user (one line on stderr)."""
    arguments = _parse(argv)
    try:
        if arguments.hostfile is not None:
            from launch.hosts import relaunch

            return relaunch(arguments.hostfile, [arguments.recipe, *arguments.overrides])
        recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)
        _check_versions()
        check_folders(recipe)
        for stage in recipe.stages:
            recipe.accumulation_steps(stage, int(os.environ.get("WORLD_SIZE", 1)))
        if arguments.dry_run:
            return _dry_run(recipe)
        return _train(recipe)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", help="a YAML file, or the name of one in launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hostfile", type=Path, help="re-launch over these hosts (see README)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    return parser.parse_intermixed_args(argv)


def find_recipe(name: str) -> Path:
    """A path as given, else a recipe that comes with the package."""
    packaged = Path(__file__).resolve().parent / "recipes" / f"{name.removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() and not Path(name).is_file() else Path(name)


def _check_versions() -> None:
    found = version("torch")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, bound)) for bound in TORCH_RANGE)
    if not TORCH_RANGE[0] <= numbers < TORCH_RANGE[1]:
        raise UserError(f"torch {found} is installed; genrecal_ds needs >= {low}, < {high}")


def _dry_run(recipe: Recipe) -> int:
    import yaml

    from genrecal_ds.training.build import describe_blocks, freeze_map, open_inputs

    open_inputs(recipe)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    for stage in recipe.stages:
        print(*freeze_map(recipe, stage), sep="\n")
    if any(stage.needs_teacher for stage in recipe.stages):
        print(f"recalibrator: {describe_blocks(recipe)}")
    return 0


def _train(recipe: Recipe) -> int:
    import yaml

    from genrecal_ds import dist
    from genrecal_ds.training.build import open_inputs

    inputs = open_inputs(recipe)  # refuses bad tokenizers and shards before any model is loaded

    import torch

    from genrecal_ds.training import engine
    from genrecal_ds.training.trainer import run_recipe

    engine.start()
    torch.use_deterministic_algorithms(recipe.deterministic)
    if dist.is_main():
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        (recipe.run_dir / "recipe.yaml").write_text(resolved)
    run_recipe(recipe, inputs)
    engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
