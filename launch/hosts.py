"""Starting a run over the hosts of a file; what DeepSpeed reads is a file that we wrote."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from genrecal_ds.hosts import read_hostfile

LOCAL_HOSTS = ("localhost", "127.0.0.1")


def relaunch(hostfile: Path, arguments: list[str]) -> int:
    """`deepspeed launch/train.py RECIPE --hostfile HOSTS`: start the run over the hosts.

    The launcher that started us knew no hosts and started local ranks only: local rank 0
    launches again, the others leave with 0. Returns the launcher's exit code.
    """
    hosts = read_hostfile(hostfile)
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return 0
    script = str(Path(__file__).resolve().parent / "train.py")
    # What the first launcher set describes its own ranks; the second must not inherit it.
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
                "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
                "LOCAL_WORLD_SIZE")  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "hostfile"
        checked.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(checked)]
        if len(hosts) == 1 and next(iter(hosts)) in LOCAL_HOSTS:
            # One local host: no ssh is needed, so none is asked for an address.
            slots = next(iter(hosts.values()))
            command = command[:-2] + ["--num_accelerators", str(slots)]
            command += ["--master_addr", "127.0.0.1"]
        return subprocess.run([*command, script, *arguments], env=environment).returncode
