"""Text from data, made safe to show."""

import sys


def printable(text: str) -> str:
    """The text with everything unprintable (control, bidi, lone surrogates) as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def complain(message: object) -> None:
    """One line on stderr; a name in it, of a file or a member, may not steer the terminal."""
    print(printable(str(message)), file=sys.stderr)
