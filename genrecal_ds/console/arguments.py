"""Parses arguments that several commands share: positive numbers, the I-th of N tasks."""

import argparse
from collections.abc import Callable


def command_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help is the module's docstring, line breaks kept."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Make an argparse type: a number of this kind above 0."""

    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return read


def share(text: str) -> tuple[int, int]:
    """Parse I/N: the I-th of N tasks, from 0."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I below N")
    return int(first), int(count)
