"""Parquet files and save_to_disk folders: rows across files, row groups and batches."""

import json
import random
import sys
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
    with pytest.raises(
        UserError, match="splits train, val; choose --split train, or .*--split train.val"
    ):
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
    with pytest.raises(UserError, match="has no file named after a split"):
        open_source(str(path), split="train")


def test_digest_sees_the_footer(tmp_path: Path, png: Callable[..., bytes]) -> None:
    """Files of one name, size, number of rows and set of columns."""
    path = tmp_path / "x.parquet"
    table = pyarrow.Table.from_pylist(rows(png))
    found = set()
    for revision in ("1", "1", "2"):
        pq.write_table(table.replace_schema_metadata({"revision": revision}), path)
        found.add((path.stat().st_size, open_source(str(path)).digest))
    assert len(found) == 2 and len({size for size, _ in found}) == 1


def test_a_file_of_any_name(tmp_path: Path, png: Callable[..., bytes], reasons: Reasons) -> None:
    write_parquet(tmp_path / "x.pq", rows(png))
    assert len(reasons(open_source(str(tmp_path / "x.pq")))) == NUM_ROWS


def test_bad_text_costs_one_row(tmp_path: Path, reasons: Reasons) -> None:
    values = pyarrow.array([b"q", b"\xff\xfe", b"r"])
    questions = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    table = pyarrow.table({"id": ["0", "1", "2"], "question": questions, "answer": ["a"] * 3})
    pq.write_table(table, tmp_path / "x.parquet")
    assert reasons(open_source(str(tmp_path / "x.parquet"))) == ["0", "arrow_data", "2"]


def test_a_damaged_page_names_the_file(tmp_path: Path, png: Callable[..., bytes]) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, rows(png))
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(UserError, match=r"x\.parquet: damaged: ") as caught:
        list(source.rows(0, len(source)))
    assert "\n" not in str(caught.value)


def test_damage_anywhere_is_one_line_or_a_rejected_row(
    tmp_path: Path, png: Callable[..., bytes]
) -> None:
    """Schema, footer, offsets, text: whatever a flipped byte hits, nothing else is raised."""
    stream, table = tmp_path / "x.arrow", tmp_path / "x.parquet"
    write_arrow(stream, rows(png)[:20])
    write_parquet(table, rows(png)[:20])
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": stream.name}]}))
    rng = random.Random(0)
    for path, opened in ((stream, tmp_path), (table, table)):
        whole = path.read_bytes()
        for _ in range(500):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] = rng.choice([0, 0x80, 0xFF])
            path.write_bytes(damaged)
            try:
                source = open_source(str(opened))
                assert len(list(source.rows(0, len(source)))) == len(source)
            except UserError as error:
                assert path.name in str(error) or "needs a column" in str(error)
                assert "\n" not in str(error)


def test_a_row_group_of_pictures_is_not_held(tmp_path: Path) -> None:
    count, size = 100, 2**18
    values = [{"image": {"bytes": bytes([n]) * size}, "question": "q"} for n in range(count)]
    table = pyarrow.Table.from_pylist(values)
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, compression="none")
    del table
    source = open_source(str(tmp_path / "x.parquet"))
    before = pyarrow.total_allocated_bytes()
    peak = max(pyarrow.total_allocated_bytes() - before for _ in source.rows(0, count))
    assert peak < count * size / 3


def test_every_cut_of_an_arrow_stream_is_found(tmp_path: Path, png: Callable[..., bytes]) -> None:
    """pyarrow takes a cut between two batches for the end."""
    path = tmp_path / "x.arrow"
    write_arrow(path, rows(png))
    whole = path.read_bytes()
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
    assert len(open_source(str(tmp_path))) == NUM_ROWS
    for size in (*range(0, len(whole), 200), len(whole) - 8, len(whole) - 4):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not an Arrow stream|cut off"):
            open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", [], "has no list _data_files"),
        ("state.json", {"_data_files": [{"filename": "../x.arrow"}]}, "not a name inside"),
        ("state.json", {"_data_files": [3]}, "not a name inside"),
        ("state.json", {"_data_files": [{"filename": "gone.arrow"}]}, "lacks .'gone.arrow'"),
        ("state.json", {"_data_files": [], "_indices_data_files": [{}]}, "flatten_indices"),
        ("dataset_dict.json", {"splits": 3}, "has no list splits"),
        ("dataset_dict.json", {"splits": [".."]}, "not a name inside"),
    ],
)
def test_odd_save_to_disk_folders(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), split=".." if name == "dataset_dict.json" else None)


def test_pyarrow_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", [{"question": "q", "answer": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install genrecal_ds\[parquet\]"):
        open_source(str(tmp_path / "x.parquet"))


def test_columns_of_the_field(tmp_path: Path, png: Callable[..., bytes]) -> None:
    """Numbered pictures, unread columns by name, and content that is refused before it is lost."""
    picture = {"bytes": png(1), "path": None}
    base = {"question": "<image 2> or <image 1>?", "answer": 1, "choices": ["x", "y"],
            "image_1": picture, "image_2": {"bytes": png(2), "path": None}, "image_3": None,
            "embedding": [0.5], "score": 3, "rationale": None}  # fmt: skip
    write_parquet(tmp_path / "x.parquet", [base])
    (row,) = open_source(str(tmp_path / "x.parquet")).rows(0, 1)
    assert isinstance(row, RawSample)
    assert row.images == [("png", png(2)), ("png", png(1))] and row.answers == ["B"]
    assert row.unread == ["embedding", "score"], "known without reading them"
    write_parquet(tmp_path / "x.parquet", [{**base, "rationale": "since"}])
    with pytest.raises(UserError, match="'rationale' looks like content .*--ignore rationale"):
        list(open_source(str(tmp_path / "x.parquet")).rows(0, 1))
    (row,) = open_source(str(tmp_path / "x.parquet"), ignore=["rationale"]).rows(0, 1)
    assert isinstance(row, RawSample) and "rationale" in row.unread


def test_a_hubs_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write_parquet(tmp_path / f"data/{name}.parquet", [{"question": name, "answer": "a"}])
    with pytest.raises(UserError, match="splits train, test"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), split="train")) == 1
    assert len(open_source(str(tmp_path), split="train+test")) == 2
