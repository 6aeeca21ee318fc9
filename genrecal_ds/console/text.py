"""Makes text from data safe to show."""


def printable(text: str) -> str:
    """The text with everything unprintable (control, bidi, lone surrogates) as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def printable_lines(text: str) -> str:
    """The same, line by line: line breaks stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
