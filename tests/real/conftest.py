"""Released tokenizers and models, fetched and converted once into runs/real."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.real import releases
from tests.fixtures import ROOT


@pytest.fixture(scope="session")
def released() -> Callable[[str], Path]:
    """released(name) -> the folder of one of releases.MODELS or releases.TOKENIZERS."""

    def folder(name: str) -> Path:
        make = releases.model if name in releases.MODELS else releases.tokenizer
        return make(name, ROOT / releases.FOLDER)

    return folder
