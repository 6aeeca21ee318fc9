"""Finds out which rank this process is, if its launcher does not set our variables."""

import os
from collections.abc import Sequence

from genrecal_ds.errors import UserError
from launch.__main__ import main as start


def start_over_hosts(given: Sequence[str]) -> int:
    """Start over hosts for `deepspeed launch/train.py .. --hostfile HOSTS`: we are a local rank.

    Local rank 0 starts the run over the hosts; the other local ranks leave with 0.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return 0
    return start([word for word in given if not word.startswith("--local_rank")])


def ranks_of_slurm() -> None:
    """Set our names of a rank from SLURM's, for `srun python launch/train.py`.

    MASTER_ADDR and MASTER_PORT come from the job script.
    """
    given = os.environ
    if "RANK" in given or "SLURM_STEP_ID" not in given or int(given.get("SLURM_NTASKS", 1)) < 2:
        return
    if "MASTER_ADDR" not in given:
        raise UserError("MASTER_ADDR is not set; export it before srun, as launch/slurm does")
    given["RANK"], given["WORLD_SIZE"] = given["SLURM_PROCID"], given["SLURM_NTASKS"]
    given["LOCAL_RANK"] = given["SLURM_LOCALID"]
