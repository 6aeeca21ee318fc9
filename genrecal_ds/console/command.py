"""Runs a command's main: a user's mistake is one line on stderr, and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

from genrecal_ds.console.text import printable
from genrecal_ds.errors import UserError

Main = Callable[[Sequence[str] | None], int]


def complain(message: object) -> None:
    """Print one line on stderr; a name in it, of a file or a member, may not steer the terminal."""
    print(f"error: {printable(str(message))}", file=sys.stderr, flush=True)


def command(main: Main) -> Callable[..., int]:
    """Decorate a main function: a UserError is said once, and the exit code is 2."""
    return _guarded(main, is_heard=lambda: True)


def command_of_ranks(main: Main) -> Callable[..., int]:
    """Decorate a main function that runs on every rank: all meet the mistake, rank 0 says it."""
    return _guarded(main, is_heard=lambda: os.environ.get("RANK", "0") == "0")


def _guarded(main: Main, is_heard: Callable[[], bool]) -> Callable[..., int]:
    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            if is_heard():
                complain(error)
            return 2

    return run
