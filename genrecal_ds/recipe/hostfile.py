"""Reads and checks hostfiles, counts the GPUs of a run, and picks a free port.

DeepSpeed copies a host into an ssh command line unchanged: a line such as
`-oProxyCommand=... slots=1` would run a command. So every line must match as a whole.
"""

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from genrecal_ds.errors import UserError

HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_LINE = re.compile(rf"({HOST.pattern})[ \t]+slots=([1-9][0-9]?)")
MAX_BYTES = 1 << 20
MAX_HOSTS, MAX_SLOTS = 4096, 64
ASSUMED_GPU_GIB, ASSUMED_GPUS_PER_HOST = 80.0, 8


def read_hostfile(path: Path) -> dict[str, int]:
    """Read {host: slots}. Raises UserError naming file, line and fix."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"--hostfile {path}: larger than {MAX_BYTES} bytes; it lists hosts?")
    hosts: dict[str, int] = {}
    # Lines end with \n only: after a lone \r or a form feed a person would not see the rest.
    lines = path.read_bytes().decode(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r").split("#")[0].strip(" \t")
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


def free_port() -> int:
    """Find a free port for ranks of this machine alone: two runs must not meet on one port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def refuse_shared_devices(places: list[tuple[str, str]]) -> None:
    """Raise UserError when two ranks drive one GPU. places: (host, device) of every rank.

    Two lines of a hostfile may name one machine. NCCL then fails, or two ranks share one GPU.
    """
    seen: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        if place in seen:
            raise UserError(
                f"ranks {seen[place]} and {rank} both drive GPU {place[1]} of {place[0]}; "
                "the hostfile names one machine twice, or with too many slots"
            )
        seen[place] = rank


class Cluster(NamedTuple):
    """GPUs in all, and at most on one host; host_bytes is None for runs on other machines."""

    gpus: int
    per_host: int
    gpu_bytes: float
    host_bytes: int | None
    described: str


def cluster_of(
    gpus: int | None, gpu_gib: float | None, hostfile: Path | None, local_gpus: Sequence[int]
) -> Cluster:
    """Describe the hosts of a file, or `gpus` GPUs, or this machine's GPUs, or one assumed GPU.

    local_gpus: bytes of each GPU of this machine. Raises UserError for a bad hostfile, and for a
    hostfile together with a number of GPUs.
    """
    here = len(local_gpus)
    size, source = ASSUMED_GPU_GIB, "assumed"
    if here:
        size, source = min(local_gpus) / 2**30, "as here"
    if gpu_gib:
        size, source = gpu_gib, "as given"
    per_host = here or ASSUMED_GPUS_PER_HOST
    if hostfile:
        if gpus:
            raise UserError(
                "--hostfile and --gpus: the file says how many; leave one of the two out"
            )
        hosts = read_hostfile(hostfile)
        total, per_host = sum(hosts.values()), max(hosts.values())
        described = f"{hostfile}: {len(hosts)} hosts, {total} GPUs"
    else:
        total = gpus or here or 1
        described = f"{total} GPUs" if gpus or here else "no GPU here: assumed 1 GPU"
    # Only a run that fits on this machine's GPUs is known to use this machine's memory.
    is_here = not hostfile and total <= here
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if is_here else None
    per_host = min(per_host, total)
    described += f" of {size:.0f} GiB ({source}), at most {per_host} on a host"
    return Cluster(total, per_host, size * 2**30, host, described)
