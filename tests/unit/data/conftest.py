"""Shards built by the tests themselves; colour and text of a sample encode its number."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.builder import build
from data_tools.sources import RawSample, Rows
from data_tools.writer import CheckedSample, ShardWriter

NUM_SAMPLES = 23
SHARD_SIZE = 8


def png(number: int, width: int = 12, height: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, 1, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def raw_sample(number: int, num_images: int) -> RawSample:
    """Sample `number`: picture j is 12+j wide, its red channel the number."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(num_images)]
    parts.append({"type": "text", "text": f"question {number:03d}"})
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": f"answer {number:03d}"}]},
    ]
    images = [("png", png(number, 12 + j)) for j in range(num_images)]
    kind = ("text", "one", "many")[num_images]
    return RawSample(images, messages, kind, [f"answer {number:03d}"], f"origin.{number}/../x")


def unit_source(num_samples: int) -> Rows:
    """Number i has i % 3 images."""
    return Rows("unit", [raw_sample(number, number % 3) for number in range(num_samples)])


@pytest.fixture(scope="session")
def raw() -> Callable[[int, int], RawSample]:
    return raw_sample


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder: 23 samples in shards of 8, number i has i % 3 images. Do not change."""
    out = tmp_path_factory.mktemp("built") / "shards"
    build(unit_source(NUM_SAMPLES), out, arguments={"seed": 0}, shard_size=SHARD_SIZE)
    return out


@pytest.fixture
def shards(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` to damage."""
    return Path(shutil.copytree(built, tmp_path / "shards"))


@pytest.fixture
def write_unchecked(tmp_path: Path) -> Callable[..., Path]:
    """Write samples of given members past the builder's checks: (members, num_images) each."""

    def write(*samples: tuple[list[tuple[str, bytes]], int], key: str = "foreign") -> Path:
        out = tmp_path / "unchecked"
        out.mkdir()
        writer = ShardWriter(out, 512)
        for row, (members, num_images) in enumerate(samples):
            sizes = [(1, 1)] * num_images
            writer.write(CheckedSample(f"{key}/{row:09d}", members, "kind", 1, sizes))
        writer.finish({})
        return out

    return write
