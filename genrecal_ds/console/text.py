"""Makes text from data safe to show."""


def printable(text: str) -> str:
    """Escape everything unprintable in a text: control, bidi, lone surrogates."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def printable_lines(text: str) -> str:
    """Escape a text line by line, so that line breaks stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
