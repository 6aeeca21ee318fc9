"""Complaints of the commands, safe to show: names from data go through genrecal_ds.console.text."""

import sys

from genrecal_ds.console.text import printable


def complain(message: object) -> None:
    """One line on stderr; a name in it, of a file or a member, may not steer the terminal."""
    print(printable(str(message)), file=sys.stderr)
