"""The tests' own ranks: exit codes, output, an end to those that hang, and what ranks differ in."""

import signal
import threading

import pytest

from tests.fixtures import ROOT, environment
from tests.forked_ranks import Rank, RankServers

pytestmark = pytest.mark.dist
SCRIPT = """
import os, sys, time
print(os.environ["RANK"], sys.argv[1:], hash("a"), __name__)
if sys.argv[1] == "hang":
    time.sleep(60)
sys.exit(int(os.environ["RANK"]) and sys.argv[1])
"""


@pytest.fixture(scope="module")
def servers():
    servers = RankServers(environment(), str(ROOT), imports=())
    yield servers
    servers.stop()


@pytest.fixture
def ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def of(word: str, seconds: float = 60.0, num_ranks: int = 2) -> list[Rank]:
        return [
            Rank(str(script), [word], environment(RANK=str(i)), str(tmp_path / f"{i}"), seconds)
            for i in range(num_ranks)
        ]

    return of


def test_each_rank_runs_as_a_process_of_its_own(servers, ranks, tmp_path):
    assert servers.run(ranks("a word")) == [0, 1]
    said = [(tmp_path / f"{i}").read_text() for i in range(2)]
    assert said[0].startswith("0 ['a word'] ") and said[0].endswith(" __main__\n")
    assert said[1].endswith("a word\n"), "what it ended with"
    seeds = [text.split()[3] for text in said]
    assert seeds[0] != seeds[1], "the order of sets would be one on all ranks"


def test_more_ranks_than_processes_that_fork_them(servers, ranks, tmp_path):
    assert servers.run(ranks("five", num_ranks=5)) == [0, 1, 1, 1, 1]
    assert [(tmp_path / f"{i}").read_text()[0] for i in range(5)] == list("01234")
    assert servers.run(ranks("alone", num_ranks=1)) == [0]


def test_ranks_that_hang_are_killed(servers, ranks):
    assert servers.run(ranks("hang", 0.5)) == [-signal.SIGKILL] * 2


def test_an_interrupted_run_leaves_no_answer_for_the_next(servers, ranks):
    def interrupt(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGUSR2, interrupt)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGUSR2))
    timer.start()
    try:
        with pytest.raises(TimeoutError):
            servers.run(ranks("hang"))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert servers.run(ranks("again")) == [0, 1]
