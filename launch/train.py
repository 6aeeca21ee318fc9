"""Runs a recipe's stages; every rank runs this file.

deepspeed --num_accelerators 2 launch/train.py RECIPE.yaml [key=value ...]
deepspeed --hostfile HOSTS launch/train.py RECIPE.yaml [key=value ...]
deepspeed launch/train.py RECIPE.yaml --hostfile HOSTS [key=value ...]
python -m launch RECIPE.yaml --hostfile HOSTS [key=value ...]
srun --ntasks-per-node 8 python launch/train.py RECIPE.yaml [key=value ...]
torchrun --nproc_per_node 2 launch/train.py RECIPE.yaml [key=value ...]
python launch/train.py RECIPE.yaml --dry-run
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed
    from genrecal_ds.training.guards import stopping

    stopping.listen()  # before slow imports: until then SIGUSR1 ends the process

from genrecal_ds.console.command import command_of_ranks
from genrecal_ds.console.redact import redact_output
from genrecal_ds.console.warn_once import warn_once
from launch.arguments import train_arguments
from launch.checks import check_torch, read_recipe
from launch.ranks import ranks_of_slurm, start_over_hosts


@command_of_ranks
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if done or stopped on request (RUN/DONE, RUN/STOPPED say which), 2 on a mistake."""
    given = sys.argv[1:] if argv is None else argv
    arguments = train_arguments(given, __doc__)
    if arguments.hostfile is not None:
        return start_over_hosts(given)
    ranks_of_slurm()
    check_torch()
    recipe = read_recipe(arguments, int(os.environ.get("WORLD_SIZE", 1)))
    if arguments.dry_run:
        from genrecal_ds.training.start import dry_run

        dry_run(recipe)
        return 0
    redact_output()  # before the heavy imports: their loggers keep the first streams
    warn_once()
    from genrecal_ds.training.start import train

    train(recipe, arguments.stage, arguments.cache_only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
