"""Pictures for sources, and rows as something that compares well."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_tools.sources import RawSample, Source


def encoded(red: int, extension: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (red, 1, 2)).save(buffer, extension)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures a.png and sub/b.jpg, a link out of it and one that stays inside."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(encoded(10))
    (root / "sub" / "b.jpg").write_bytes(encoded(20, "JPEG"))
    (tmp_path / "secret.png").write_bytes(encoded(30))
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to("a.png")
    (root / "folder-out").symlink_to(tmp_path)
    return root


@pytest.fixture(scope="session")
def reasons() -> Callable[[Source], list[str]]:
    """Per row: its source_id, or the reason it was rejected for."""

    def read(source: Source) -> list[str]:
        rows = list(source.rows(0, len(source)))
        for start in range(len(source)):
            for stop in (start, start + 1, len(source)):
                found = list(source.rows(start, stop))
                assert [str(row) for row in found] == [str(row) for row in rows[start:stop]]
        return [row.source_id if isinstance(row, RawSample) else row.reason for row in rows]

    return read
