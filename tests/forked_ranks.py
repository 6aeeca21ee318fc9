"""Ranks as forks of a process that has imported everything: most of a small run is its imports.

One such process per rank number, so that ranks differ in what Python draws for a process: the order
of a set of strings is not the same on two ranks, and a collective called in that order still hangs.
Run as a module this is that process. It reads one request a line and answers with its exit code.
Before a fork it does nothing but import, so no thread is lost; a fork leaves the loop, runs the
script as __main__ and ends as any interpreter does.
"""

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


class Rank(NamedTuple):
    script: str
    arguments: list[str]
    environment: dict[str, str]
    output: str  # a file for stdout and stderr
    seconds: float  # killed after them


class RankServers:
    """They end with this process."""

    def __init__(self, environment: dict[str, str], cwd: str):
        self._environment, self._cwd = environment, cwd
        self._servers: list[subprocess.Popen] = []

    def run(self, ranks: list[Rank]) -> list[int]:
        """Exit codes, those of a signal negative."""
        while len(self._servers) < len(ranks):
            self._servers.append(self._start())
        asked = list(zip(self._servers, ranks, strict=False))
        try:
            for server, rank in asked:
                assert server.stdin is not None
                server.stdin.write(json.dumps(rank) + "\n")
                server.stdin.flush()
            return [_answer(server) for server, _ in asked]
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
            [sys.executable, "-m", "tests.forked_ranks"], env=self._environment, cwd=self._cwd,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip


def _answer(server: subprocess.Popen) -> int:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("a process that forks ranks has ended")
    return int(line)


def serve(requests: Iterator[str]) -> Rank | None:
    """Returns in a fork, with what it is to run, and at the end, with nothing."""
    for line in requests:
        rank = Rank(*json.loads(line))
        pid = os.fork()
        if not pid:
            return rank
        print(_wait(pid, time.monotonic() + rank.seconds), flush=True)
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
    sys.argv = [rank.script, *rank.arguments]
    sys.path.insert(0, os.path.dirname(rank.script))


def main() -> None:
    import genrecal_ds.evaluate.__main__
    import genrecal_ds.training.run  # noqa: F401

    rank = serve(iter(sys.stdin))
    if rank is not None:
        _become(rank)
        runpy.run_path(rank.script, run_name="__main__")


if __name__ == "__main__":
    main()
