"""A user reads a mistake as one line on stderr that steers no terminal; the exit code is 2."""

import pytest

from genrecal_ds.console.command import command, command_of_ranks
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit


def main(argv=None):
    """Say a mistake."""
    if argv:
        raise UserError(argv[0])
    return 0


def test_a_mistake_is_said_once_and_the_exit_code_is_2(capsys):
    assert command(main)([]) == 0 and capsys.readouterr().err == ""
    assert command(main)(["seed: missing; add it"]) == 2
    assert capsys.readouterr().err == "error: seed: missing; add it\n"
    assert command(main).__doc__ == main.__doc__


def test_names_in_a_mistake_do_not_steer_the_terminal(capsys):
    assert command(main)(["a\x1b[2J\nb: no such file"]) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2J\\nb: no such file\n"


def test_other_errors_are_defects_of_ours():
    with pytest.raises(ZeroDivisionError):
        command(lambda argv: 1 // 0)([])


@pytest.mark.parametrize("rank, said", [(None, True), ("0", True), ("3", False)])
def test_of_many_ranks_only_the_first_says_it(monkeypatch, capsys, rank, said):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert command_of_ranks(main)(["x"]) == 2
    assert capsys.readouterr().err == ("error: x\n" if said else "")
