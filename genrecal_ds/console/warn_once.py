"""Shows each warning of a library once a process, however often it comes."""

import warnings
from typing import TextIO


def warn_once() -> None:
    """Show each warning once from now on.

    Python's own memory of shown warnings is lost whenever somebody enters warnings.catch_warnings,
    and the filter "once" keeps no other. subprocess.Popen enters it, and on CPUs DeepSpeed starts a
    process in every step.
    """
    show, shown = warnings.showwarning, set[tuple[type[Warning], str]]()

    def show_new(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if (category, str(message)) not in shown:
            shown.add((category, str(message)))
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_new
