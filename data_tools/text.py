"""Prints the data tools' error messages, with text from data made safe to show."""

import sys

from genrecal_ds.console.text import printable


def complain(message: object) -> None:
    """One line on stderr; a name in it, of a file or a member, may not steer the terminal."""
    print(printable(str(message)), file=sys.stderr)
