"""Ranks as forks of one process that has imported everything: most of a small run is its imports.

fixtures.run_ranks calls `start` and `ask`; run as a module this is that process. It reads one
request a line and answers with a line of exit codes. Before a fork it does nothing but import, so
no thread is lost and nothing is decided that a rank decides for itself; a fork leaves the loop,
runs the script as __main__ and ends as any interpreter does.
"""

import atexit
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


def start(environment: dict[str, str], cwd: str) -> subprocess.Popen:
    """The process that forks; it ends with this one."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forked_ranks"],
        env=environment, cwd=cwd, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return server


def ask(server: subprocess.Popen, ranks: list[Rank], seconds: float) -> list[int]:
    """Exit codes, those of a signal negative. Ranks that take longer are killed."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"ranks": ranks, "seconds": seconds}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process that forks ranks ended with exit code {server.wait()}"
    codes: list[int] = json.loads(answer)
    return codes


def serve(requests: Iterator[str]) -> Rank | None:
    """Returns in a fork, with what it is to run, and at the end, with nothing."""
    for line in requests:
        request = json.loads(line)
        pids = []
        for fields in request["ranks"]:
            if pid := os.fork():
                pids.append(pid)
            else:
                return Rank(*fields)
        print(json.dumps(_wait(pids, request["seconds"])), flush=True)
    return None


def _wait(pids: list[int], seconds: float) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return [codes[pid] for pid in pids]


def _become(rank: Rank) -> None:
    os.environ.clear()
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
