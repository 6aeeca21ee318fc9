"""Tiny folders of every family, each written once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.zoo import Kind, build


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Callable[..., Path]:
    """zoo(row, kind) -> the folder of that row."""
    root, written = tmp_path_factory.mktemp("zoo"), {}

    def folder(row: str, kind: Kind = "byte_bpe") -> Path:
        if (row, kind) not in written:
            written[row, kind] = build(row, root / f"{row}-{kind}", kind)
        return written[row, kind]

    return folder
