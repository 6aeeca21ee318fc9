"""Replaces secrets by [redacted] in everything that a run prints or writes.

A leaf of the imports: nothing heavy is imported. Tokens are recognised by their form, other secrets
by the name of their key.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

REDACTED = "[redacted]"

_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI and others
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"  # GitHub
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,}"  # JWT
)
_USER_AND_PASSWORD = re.compile(r"(:/{1,2})[^/\s:@]+:[^/\s@]+(?=@)")  # paths lose a slash
# "tokens" counts pieces of text here; a number is no secret.
_NAME = r"(?:api_?keys?|access_?keys?|secrets?|passwords?|passwd|token|credentials?)"
_ASSIGNED = re.compile(
    rf"""(?ix)\b([a-z0-9_.-]*{_NAME})\b (["']?\s*[=:]\s*["']?) (?![\d.,]+\b)([\w./+~-]{{8,}})"""
)
_SECRET_KEY = re.compile(rf"(?i){_NAME}$")


def redact(text: str) -> str:
    """Return the text with [redacted] in place of what looks like a secret."""
    text = _TOKENS.sub(REDACTED, text)
    text = _USER_AND_PASSWORD.sub(rf"\1{REDACTED}", text)
    return _ASSIGNED.sub(rf"\1\2{REDACTED}", text)


def redact_tree(tree: Any, key: str = "") -> Any:
    """Redact nested mappings and lists; a string under a key named like a secret goes whole."""
    if isinstance(tree, Mapping):
        return {name: redact_tree(value, str(name)) for name, value in tree.items()}
    if isinstance(tree, str):
        return REDACTED if _SECRET_KEY.search(key) else redact(tree)
    if isinstance(tree, Sequence):
        return [redact_tree(value, key) for value in tree]
    return tree


class _RedactingStream:
    """Redacts another stream line by line, so that no secret hides across two writes."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        head, newline, rest = (self._line + text).rpartition("\n")
        self._line = rest
        if newline:
            self._stream.write(redact(head) + newline)
        return len(text)

    def flush(self) -> None:
        if self._line:  # a progress bar's line has no end
            self._stream.write(redact(self._line))
            self._line = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """Redact stdout and stderr of this process from now on, tracebacks included."""
    sys.stdout = _RedactingStream(sys.stdout)  # type: ignore[assignment]
    sys.stderr = _RedactingStream(sys.stderr)  # type: ignore[assignment]
