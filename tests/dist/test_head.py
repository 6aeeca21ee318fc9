"""Where the frozen head lies changes neither losses nor gradients, only what is on the wire."""

import pytest

from tests.fixtures import ROOT, run_ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("world_size", [2, 3])
def test_placements_are_equal_and_send_what_their_formulas_say(pair, world_size):
    run_ranks(ROOT / "tests/dist/ranks_head.py", [pair / "teacher_init"], world_size)
