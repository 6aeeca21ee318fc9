"""Hostfiles, checked before DeepSpeed sees them.

DeepSpeed puts a host into an ssh command line as it stands: a line such as
`-oProxyCommand=... slots=1` would run a command. So every line must match whole, and what
DeepSpeed reads is a file that we wrote.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from genrecal_ds.errors import UserError

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]{0,252})\s+slots=([1-9][0-9]?)")
MAX_HOSTS, MAX_SLOTS = 4096, 64
LOCAL_HOSTS = ("localhost", "127.0.0.1")


def read_hostfile(path: Path) -> dict[str, int]:
    """{host: slots}. Raises UserError naming file, line and fix."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if not match or int(match[2]) > MAX_SLOTS:
            raise UserError(f"{path}:{number}: {line!r}; write: hostname slots=1..{MAX_SLOTS}")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: host {match[1]} appears twice; add up its slots")
        hosts[match[1]] = int(match[2])
    if not 0 < len(hosts) <= MAX_HOSTS:
        raise UserError(f"{path}: {len(hosts)} hosts; 1..{MAX_HOSTS} are possible")
    return hosts


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
