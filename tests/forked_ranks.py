"""Ranks as forks of a process that has imported everything: most of a small run is its imports.

There are two such processes, one for even ranks and one for odd ones, so that ranks differ in what
Python draws for a process: the order of a set of strings is not the same on rank 0 and on rank 1,
and a collective called in that order still hangs.
Run as a module this is that process. It reads ranks, one list a line, and answers with exit codes.
Before a fork it does nothing but import, so no thread is lost; a fork leaves the loop, runs the
script as __main__ and ends as any interpreter does.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

POLL_SECONDS = 0.02
NUM_SERVERS = 2
# What every run imports when it comes to it. Muon is there for its imports alone: DeepSpeed looks
# whether an optimizer is of that class, which brings in torch's compiler.
IMPORTS = (
    "genrecal_ds.evaluate.__main__",
    "genrecal_ds.training.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",
    "transformers.models.internvl.modeling_internvl",
    "transformers.models.internvl.processing_internvl",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "webdataset",
)


class Rank(NamedTuple):
    script: str
    arguments: list[str]
    environment: dict[str, str]
    output: str  # a file for stdout and stderr
    seconds: float  # killed after them


class RankServers:
    """They end with this process."""

    def __init__(self, environment: dict[str, str], cwd: str, imports: tuple[str, ...] = IMPORTS):
        self._environment, self._cwd, self._imports = environment, cwd, imports
        self._servers: list[subprocess.Popen] = []

    def run(self, ranks: list[Rank]) -> list[int]:
        """Exit codes, those of a signal negative."""
        while len(self._servers) < NUM_SERVERS:
            self._servers.append(self._start())
        codes = [0] * len(ranks)
        try:
            for number, server in enumerate(self._servers):
                assert server.stdin is not None
                server.stdin.write(json.dumps(ranks[number::NUM_SERVERS]) + "\n")
                server.stdin.flush()
            for number, server in enumerate(self._servers):
                codes[number::NUM_SERVERS] = _answer(server)
            return codes
        except BaseException:
            # An answer left unread would be taken for the next test's.
            self.stop()
            raise

    def stop(self) -> None:
        """With the ranks that run."""
        for server in self._servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        self._servers.clear()

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.forked_ranks", *self._imports], cwd=self._cwd,
            env=self._environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip


def _answer(server: subprocess.Popen) -> list[int]:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("a process that forks ranks has ended")
    return json.loads(line)


def serve(requests: Iterator[str]) -> Rank | None:
    """Returns in a fork, with what it is to run, and at the end, with nothing."""
    for line in requests:
        forks: list[tuple[int, float]] = []  # (pid, when it is killed)
        for rank in (Rank(*asked) for asked in json.loads(line)):
            pid = os.fork()
            if not pid:
                return rank
            forks.append((pid, time.monotonic() + rank.seconds))
        print([_wait(pid, deadline) for pid, deadline in forks], flush=True)
    return None


def _wait(pid: int, deadline: float) -> int:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _become(rank: Rank) -> None:
    os.environ.update(rank.environment)
    file = os.open(rank.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    # What is frozen lives until the process ends, and Triton's library then complains of leaks.
    atexit.register(os.dup2, nothing, 2)
    sys.argv = [rank.script, *rank.arguments]
    sys.path.insert(0, os.path.dirname(rank.script))


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, (
        "an import starts a thread: no fork would have it"
    )
    # A run collects garbage several times, and each time would go through all that was imported.
    gc.collect()
    gc.freeze()
    rank = serve(iter(sys.stdin))
    if rank is not None:
        _become(rank)
        runpy.run_path(rank.script, run_name="__main__")


if __name__ == "__main__":
    main()
