"""Text from data, made safe to show."""


def printable(text: str) -> str:
    """The text with everything unprintable (control, bidi, lone surrogates) as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
