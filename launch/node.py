"""Runs one host's part of a run by DeepSpeed's launcher, which another host can end.

python -m launch.node --hosts a:8,b:8 --node-rank 1 --master a:29500 [--control] -- RECIPE ...

With --control the first line of stdin is the environment as JSON, so no value meets a shell or a
process list. Later lines are `stop` or `kill`. The end of stdin means that the starting process is
gone. Only processes started from here are ever signalled, by their pids.
"""

import argparse
import base64
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from genrecal_ds.recipe.hostfile import HOST

Messages = queue.SimpleQueue  # of str: stop, kill, lost

TRAIN = Path(__file__).resolve().parent / "train.py"
# From the first rank's end (or a lost connection) until the others are killed. DeepSpeed's
# launcher alone would wait 30 s for each rank after another.
GRACE_SECONDS = 20.0


def main(argv: list[str] | None = None) -> int:
    """Run the ranks; return their exit code, 128 + n if signal n ended them."""
    arguments = _parse(argv)
    messages: Messages = queue.SimpleQueue()  # may be put to from a signal handler
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: messages.put("stop"))
    environment = dict(os.environ)
    if arguments.control:
        environment |= json.loads(sys.stdin.readline() or "{}")
        threading.Thread(target=_read_control, args=(messages,), daemon=True).start()
    # The launcher gets its own group: Ctrl-C on a terminal reaches only us, and we tell the ranks.
    launcher = subprocess.Popen(command(arguments), env=environment, start_new_session=True)
    return Ranks(launcher, messages).wait()


def command(arguments: argparse.Namespace) -> list[str]:
    """Return the command of DeepSpeed's per-host launcher for this host."""
    world = {host: list(range(slots)) for host, slots in arguments.hosts.items()}
    address, port = arguments.master.rsplit(":", 1)
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch",
        "--world_info=" + base64.urlsafe_b64encode(json.dumps(world).encode()).decode(),
        f"--node_rank={arguments.node_rank}", f"--master_addr={address}", f"--master_port={port}",
        "--no_local_rank", str(TRAIN), *arguments.arguments,
    ]  # fmt: skip


class Ranks:
    """Holds DeepSpeed's launcher and the ranks that it started."""

    def __init__(self, launcher: subprocess.Popen, messages: Messages):
        self.launcher, self.messages = launcher, messages
        self.process = psutil.Process(launcher.pid)
        self.most_ranks = 0
        self.deadline = float("inf")

    def wait(self) -> int:
        while self.launcher.poll() is None:
            ranks = self._ranks()
            self.most_ranks = max(self.most_ranks, len(ranks))
            if len(ranks) < self.most_ranks:
                self._allow(GRACE_SECONDS)
            if time.monotonic() > self.deadline:
                self._kill()
                break
            try:
                self._obey(self.messages.get(timeout=0.5), ranks)
            except queue.Empty:
                pass
        code = self.launcher.wait()
        self._kill()
        return code if code >= 0 else 128 - code

    def _obey(self, message: str, ranks: list[psutil.Process]) -> None:
        if message == "kill":
            return self._kill()
        if message == "lost":
            self._allow(GRACE_SECONDS)
        for rank in ranks:  # the ranks alone: data workers must outlive their rank's last step
            try:
                rank.send_signal(signal.SIGUSR1)
            except psutil.NoSuchProcess:
                pass

    def _allow(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _ranks(self) -> list[psutil.Process]:
        try:
            children = self.process.children()
            return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def _kill(self) -> None:
        try:
            tree = [*self.process.children(recursive=True), self.process]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def _read_control(messages: Messages) -> None:
    for line in sys.stdin:
        messages.put(line.strip())
    messages.put("lost")


def _hosts(text: str) -> dict[str, int]:
    hosts = {}
    for part in text.split(","):
        host, _, slots = part.rpartition(":")
        if not HOST.fullmatch(host) or not slots.isdigit():
            raise argparse.ArgumentTypeError(f"{part!r}: write host:slots")
        hosts[host] = int(slots)
    return hosts


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.node", description=__doc__)
    parser.add_argument("--hosts", required=True, type=_hosts)
    parser.add_argument("--node-rank", required=True, type=int)
    parser.add_argument("--master", required=True, metavar="HOST:PORT")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("arguments", nargs="+", help="those of launch/train.py, behind --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
