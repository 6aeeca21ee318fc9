"""Five runs of chaos.py; `make chaos N=20` does more."""

import pytest

from tests.cluster.chaos import chaos

pytestmark = pytest.mark.cluster


@pytest.mark.timeout(900)
def test_runs_with_a_killed_rank_lose_nothing(tmp_path, pair, shards):
    hits = chaos(pair, shards, tmp_path, runs=5, seed=0)
    assert sum(map(len, hits)) >= 4, hits
