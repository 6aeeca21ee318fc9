"""Prints the data tools' error messages, with text from data made safe to show."""

import sys

from genrecal_ds.console.text import printable


def complain(message: object) -> None:
    """Print one line on stderr; a file or member name in it cannot steer the terminal."""
    print(printable(str(message)), file=sys.stderr)
