"""Prints the sections and refusals of a command that runs every check before it exits."""

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from genrecal_ds.console.text import printable
from genrecal_ds.errors import UserError

# What transformers, jinja and safetensors raise at a folder that is broken, or that needs a package
# that is not installed.
OF_A_FOLDER = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError,
    SafetensorError, TemplateError,
)  # fmt: skip


class Findings:
    """Prints sections as they come, and keeps the refusals for the end."""

    def __init__(self, console: Console):
        self.console = console
        self.in_colour = console.is_terminal and not console.no_color
        self.refusals: list[str] = []

    def section(self, title: str) -> None:
        self.say("")
        self.say(title, "bold")

    def say(self, line: str | Text, style: str = "") -> None:
        """Print one line, never wrapped, so that it can be searched or read by a program."""
        text = line if isinstance(line, Text) else Text(printable(line), style)
        self.console.print(text, soft_wrap=True)

    def refuse(self, line: str) -> None:
        if line not in self.refusals:
            self.refusals.append(line)
            self.say(f"REFUSED  {line}", "red")

    @contextmanager
    def attempt(self, key: str, fix: str | None = None) -> Iterator[None]:
        """Turn an error inside into a refusal of this key, so that the next check can go on.

        fix: for errors of libraries that read a model folder, which no UserError explains.
        """
        try:
            yield
        except UserError as error:
            self.refuse(str(error) if str(error).startswith(key) else f"{key}: {error}")
        except OF_A_FOLDER as error:
            if fix is None:
                raise  # a defect of ours is no refusal
            message = " ".join(str(error).split())[:300]
            self.refuse(f"{key}: {type(error).__name__}: {message}; {fix}")
