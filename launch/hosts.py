"""Starts a run on every host of a hostfile, and ends the run on all of them.

DeepSpeed's multi-node launcher is not used. It puts hosts and environment into shell commands,
reads a .deepspeed_env file if there is one, ends ranks by a pattern on every host, and can report
success when its child died by a signal. launch/node.py uses DeepSpeed's per-host launcher.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from genrecal_ds.console.redact import redact
from genrecal_ds.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LOCAL_HOSTS = ("localhost", "127.0.0.1")
# Names that ranks on other hosts get from this environment. Values travel on stdin.
PASSED = (
    "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHON", "OMP_", "MKL_", "CUDA_", "NCCL_", "GLOO_",
    "TORCH", "TRITON_", "DS_", "UCX_", "FI_", "HF_", "TRANSFORMERS_", "WANDB_", "AWS_", "GOOGLE_",
)  # fmt: skip
# What another launcher set describes its own ranks; ours must not inherit it.
OF_A_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK",
    "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15",
    "-o", "ServerAliveCountMax=3",
)  # fmt: skip


def run_over(hosts: dict[str, int], arguments: list[str], master: str, logs: Path) -> int:
    """Run launch/train.py's arguments on every host; 0 when all ended well, else the first code.

    hosts: {name: ranks}, from read_hostfile. master: HOST:PORT on the first host.
    logs: a folder for one log per host. SIGUSR1, SIGTERM and Ctrl-C stop the run at the next step
    on all hosts; a second Ctrl-C or SIGTERM kills it. Raises UserError for impossible hosts.
    """
    is_local = len(hosts) == 1 and next(iter(hosts)) in LOCAL_HOSTS
    if not is_local and (wrong := [host for host in hosts if host in LOCAL_HOSTS]):
        raise UserError(f"hostfile: {wrong[0]} beside other hosts; name it as they reach it")
    nodes = [
        Node(host, _node_command(hosts, number, master, arguments, is_local), logs)
        for number, host in enumerate(hosts)
    ]
    _forward_signals(nodes)
    code = _wait(nodes)
    for node in nodes:
        node.finish()
    return code


class Node:
    """One host: the process that runs its ranks, the control line, and the log."""

    def __init__(self, host: str, command: list[str], logs: Path):
        self.host = host
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._log = (logs / f"{host}.log").open("a")
        assert self.process.stdout is not None
        self._copier = threading.Thread(target=self._copy, args=(self.process.stdout,))
        self._copier.start()
        self.say(json.dumps(_environment()))

    def say(self, line: str) -> None:
        """Send a word to the host's launch/node.py; a host that has ended ignores it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):  # ValueError: closed on purpose
            pass

    def finish(self) -> None:
        self._copier.join(10)
        self._log.close()

    def _copy(self, lines: IO[str]) -> None:
        for line in lines:
            line = redact(line)
            self._log.write(line)
            self._log.flush()
            sys.stdout.write(line)
            sys.stdout.flush()


def _node_command(
    hosts: dict[str, int], number: int, master: str, arguments: list[str], is_local: bool
) -> list[str]:
    listed = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
    command = [sys.executable, "-u", "-m", "launch.node", "--hosts", listed]
    command += ["--node-rank", str(number), "--master", master, "--control", "--", *arguments]
    if is_local:
        return command
    remote = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"
    return [*SSH, list(hosts)[number], remote]


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED) and name not in OF_A_LAUNCHER
    }


def _forward_signals(nodes: list[Node]) -> None:
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        word = "kill" if asked and number != signal.SIGUSR1 else "stop"
        asked.append(number)
        for node in nodes:
            node.say(word)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)


def _wait(nodes: Iterable[Node]) -> int:
    """Wait until all hosts have ended; the first host that fails ends the others."""
    running, first_code = list(nodes), 0
    while running:
        for node in list(running):
            code = node.process.poll()
            if code is None:
                continue
            running.remove(node)
            if code and not first_code:
                first_code = code if code > 0 else 128 - code
                print(f"{node.host}: its ranks ended with code {first_code}; ending all hosts",
                      file=sys.stderr, flush=True)  # fmt: skip
                for other in running:
                    # The end of stdin makes launch/node.py end ranks that wait for a lost peer.
                    assert other.process.stdin is not None
                    try:
                        other.process.stdin.close()
                    except OSError:
                        pass
        time.sleep(0.2)
    return first_code
