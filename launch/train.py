"""Runs a recipe's stages; every rank runs this file.

deepspeed --num_accelerators 2 launch/train.py RECIPE.yaml [key=value ...]
deepspeed --hostfile HOSTS launch/train.py RECIPE.yaml [key=value ...]
deepspeed launch/train.py RECIPE.yaml --hostfile HOSTS [key=value ...]
python -m launch RECIPE.yaml --hostfile HOSTS [key=value ...]
srun --ntasks-per-node 8 python launch/train.py RECIPE.yaml [key=value ...]
torchrun --nproc_per_node 2 launch/train.py RECIPE.yaml [key=value ...]
python launch/train.py RECIPE.yaml --dry-run
"""

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from genrecal_ds.training.guards import stopping  # noqa: E402

if __name__ == "__main__":
    stopping.listen()  # before anything slow: until then SIGUSR1 would end the process

from genrecal_ds.console.redact import redact_output, redact_tree  # noqa: E402
from genrecal_ds.errors import UserError  # noqa: E402
from genrecal_ds.recipe.config import Recipe  # noqa: E402
from genrecal_ds.recipe.recipe_file import check_folders, load_recipe  # noqa: E402

TORCH_RANGE = ((2, 11), (2, 15))  # as in setup.py


def main(argv: list[str] | None = None) -> int:
    """0 done or stopped on request (RUN/DONE, RUN/STOPPED say which), 2 a mistake of the user."""
    arguments = _parse(argv)
    try:
        if arguments.hostfile is not None:
            return _start_over_hosts(argv)
        ranks_of_slurm()
        recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)
        _check_versions()
        check_folders(recipe)
        names = [stage.name for stage in recipe.stages]
        if arguments.stage not in (None, *names):
            raise UserError(f"--stage {arguments.stage}: the recipe's stages are {names}")
        for stage in recipe.stages:
            recipe.accumulation_steps(stage, int(os.environ.get("WORLD_SIZE", 1)))
        if arguments.dry_run:
            return _dry_run(recipe)
        return _train(recipe, arguments.stage, arguments.cache_only)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", help="a YAML file, or the name of one in launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hostfile", type=Path, help="start over these hosts (see README)")
    parser.add_argument("--master_addr", help=argparse.SUPPRESS)  # with --hostfile
    parser.add_argument("--master_port", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help="train this one of the recipe's stages only")
    parser.add_argument(
        "--cache-only", action="store_true",
        help="write the teacher's rows that distill will read (teacher.cache), train nothing",
    )  # fmt: skip
    parser.add_argument(
        "--trust-checkpoint", action="store_true",
        help="load checkpoints that others own or may write: they are code",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    arguments = parser.parse_intermixed_args(argv)
    if arguments.trust_checkpoint:
        arguments.overrides.append("checkpoint.trust=true")
    return arguments


def _start_over_hosts(argv: list[str] | None) -> int:
    """The card's form: a launcher that knew no hosts started local ranks, and us as one of them.

    Local rank 0 starts the run over the hosts, the others leave with 0.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return 0
    from launch.__main__ import main as start

    given = sys.argv[1:] if argv is None else argv
    return start([word for word in given if not word.startswith("--local_rank")])


def ranks_of_slurm() -> None:
    """`srun python launch/train.py`: SLURM's names of a rank, where no launcher gave ours.

    MASTER_ADDR and MASTER_PORT come from the job script.
    """
    given = os.environ
    if "RANK" in given or "SLURM_STEP_ID" not in given or int(given.get("SLURM_NTASKS", 1)) < 2:
        return
    if "MASTER_ADDR" not in given:
        raise UserError("MASTER_ADDR is not set; export it before srun, as launch/slurm does")
    given["RANK"], given["WORLD_SIZE"] = given["SLURM_PROCID"], given["SLURM_NTASKS"]
    given["LOCAL_RANK"] = given["SLURM_LOCALID"]


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

    from genrecal_ds.estimate.describe import describe_blocks, freeze_map
    from genrecal_ds.training.inputs import open_inputs

    open_inputs(recipe)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    for stage in recipe.stages:
        print(*freeze_map(recipe, stage), sep="\n")
    if any(stage.facts.has_recalibrator for stage in recipe.stages):
        print(f"recalibrator: {describe_blocks(recipe)}")
    return 0


def _train(recipe: Recipe, stage: str | None, is_cache_only: bool) -> int:
    import yaml

    redact_output()
    from genrecal_ds import dist
    from genrecal_ds.training.inputs import open_inputs

    inputs = open_inputs(recipe)  # refuses bad tokenizers and shards before any model is loaded

    import torch

    from genrecal_ds.training import engine
    from genrecal_ds.training.run import fill_caches, run_recipe

    engine.start(recipe.faults.stall_seconds, recipe.run_dir / "logs")
    _check_devices()
    torch.use_deterministic_algorithms(recipe.deterministic)
    if is_cache_only:
        fill_caches(recipe, inputs)
        dist.leave()
        return 0
    if dist.is_main():
        (recipe.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        tree = redact_tree(recipe.model_dump(mode="json"))
        (recipe.run_dir / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    run_recipe(recipe, inputs, stage)
    dist.leave()
    return 0


def _check_devices() -> None:
    """What only the ranks together can see; in `deepspeed --hostfile` nobody checked it before."""
    import socket

    import torch

    from genrecal_ds import dist
    from genrecal_ds.recipe.hostfile import refuse_shared_devices

    stated = int(os.environ.get("WORLD_SIZE", 1))
    if dist.world_size() != stated:
        raise UserError(f"WORLD_SIZE is {stated}, {dist.world_size()} ranks met; check the hosts")
    if torch.cuda.is_available():
        device = str(torch.cuda.get_device_properties(dist.local_rank()).uuid)
        refuse_shared_devices(dist.gather_objects((socket.gethostname(), device)))


if __name__ == "__main__":
    sys.exit(main())
