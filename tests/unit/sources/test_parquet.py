"""Parquet files and save_to_disk folders: rows across files, row groups and batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.sources import RawSample, Source
from data_tools.sources.parquet import BATCH_ROWS, open_source
from genrecal_ds.errors import UserError

pyarrow = pytest.importorskip("pyarrow", reason="an extra: pip install genrecal_ds[parquet]")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.unit

Reasons = Callable[[Source], list[str]]
NUM_ROWS = 3 * BATCH_ROWS + 5


def rows(png: Callable[..., bytes], first: int = 0) -> list[dict[str, Any]]:
    """LLaVA-OneVision's layout; every fifth row is text only."""
    found = []
    for number in range(first, first + NUM_ROWS):
        has_picture = number % 5 != 0
        mark = "<image>\n" if has_picture else ""
        turns = [
            {"from": "human", "value": f"{mark}q{number}"},
            {"from": "gpt", "value": f"a{number}"},
        ]
        picture = {"bytes": png(number % 250), "path": "/etc/passwd"} if has_picture else None
        found.append(
            {"id": f"r{number}", "image": picture, "conversations": turns, "data_source": "ov"}
        )
    return found


def write_parquet(path: Path, values: list[dict[str, Any]], group: int = 7) -> None:
    pq.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=group)


def write_arrow(path: Path, values: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(values)
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=20)


@pytest.fixture(params=["file", "folder", "save_to_disk", "dict"])
def source(request: Any, tmp_path: Path, png: Callable[..., bytes]) -> Source:
    """The same rows in every layout, of two files but in the first."""
    folder = tmp_path / "data"
    (folder / "val").mkdir(parents=True)
    if request.param == "file":
        write_parquet(folder / "x.parquet", rows(png) + rows(png, NUM_ROWS))
        return open_source(str(folder / "x.parquet"))
    if request.param == "folder":
        for number in range(2):
            write_parquet(folder / f"{number}.parquet", rows(png, number * NUM_ROWS))
        return open_source(str(folder))
    place = folder / "val" if request.param == "dict" else folder
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(names):
        write_arrow(place / name, rows(png, number * NUM_ROWS))
    files = [{"filename": name} for name in names]
    (place / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
    if request.param == "save_to_disk":
        return open_source(str(folder))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "val"]}))
    with pytest.raises(UserError, match="choose --split of train, val"):
        open_source(str(folder))
    return open_source(str(folder), split="val")


def test_golden_in_every_layout(
    source: Source, png: Callable[..., bytes], reasons: Reasons
) -> None:
    assert reasons(source) == [f"r{number}" for number in range(2 * NUM_ROWS)]
    for number, row in enumerate(source.rows(0, len(source))):
        assert isinstance(row, RawSample) and row.kind == "ov"
        has_picture = number % 5 != 0
        assert row.images == ([("png", png(number % 250))] if has_picture else [])
        parts = [{"type": "image"}] * has_picture + [{"type": "text", "text": f"q{number}"}]
        assert row.messages[0]["content"] == parts
        assert row.messages[1]["content"] == [{"type": "text", "text": f"a{number}"}]


def test_question_columns_and_traps(
    tmp_path: Path, png: Callable[..., bytes], reasons: Reasons
) -> None:
    base = {"id": "x", "images": [{"bytes": png(1), "path": None}], "question": "q?"}
    values = [
        {**base, "answers": ["a", "b"]},
        {**base, "answers": ["a"], "images": []},
        {**base, "answers": ["a"], "images": [{"bytes": None, "path": "a.png"}]},
        {**base, "answers": ["a"], "images": [{"bytes": b"GIF89a", "path": None}]},
        {**base, "answers": []},
        {**base, "answers": ["a"], "question": None},
    ]
    write_parquet(tmp_path / "x.parquet", values)
    found = open_source(str(tmp_path / "x.parquet"))
    expected = ["x", "x", "image_missing", "image_format", "answer", "conversations"]
    assert reasons(found) == expected
    (first,) = found.rows(0, 1)
    assert isinstance(first, RawSample) and first.answers == ["a", "b"]


def test_unreadable_and_digest(tmp_path: Path, png: Callable[..., bytes]) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="not a parquet file"):
        open_source(str(path))
    with pytest.raises(UserError, match=r"lacks any \.parquet file"):
        open_source(str(tmp_path / "nowhere"))
    write_parquet(path, [{"picture": b"", "label": 3}])
    with pytest.raises(UserError, match="needs a column conversations"):
        open_source(str(path))
    write_parquet(path, rows(png))
    before = open_source(str(path)).digest
    assert open_source(str(path)).digest == before
    write_parquet(path, rows(png)[:-1])
    assert open_source(str(path)).digest != before
    with pytest.raises(UserError, match="is no DatasetDict"):
        open_source(str(path), split="train")
