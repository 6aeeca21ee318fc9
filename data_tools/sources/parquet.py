"""Parquet files and Hugging Face `save_to_disk` folders, streamed by pyarrow.

Pictures are read a few rows at a time: a row group of many gigabytes is never held whole. Only
plain Arrow types are read; a path without bytes is never opened, a URL never fetched.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.sources import RawSample
from data_tools.sources.conversations import id_of, kind_of, scored_answers, to_messages
from data_tools.sources.files import read_json, with_extension
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

BATCH_ROWS = 16
COLUMNS = (
    "id", "image", "images", "conversations", "messages", "question", "answer", "answers",
    "data_source", "source", "kind",
)  # fmt: skip


def open_source(path: str, *, split: str | None = None) -> "Parquet":
    """path: a .parquet file, a folder of them, or a save_to_disk folder (split: of a DatasetDict).

    Columns: image or images (struct {bytes, path}, a list of those, or bytes), and conversations,
    messages, or question with answer(s); id, data_source optional.
    """
    return Parquet(Path(path), split)


class Parquet:
    """Rows are the files' rows, files by name (or in state.json's order)."""

    name = "parquet"

    def __init__(self, path: Path, split: str | None) -> None:
        files, facts_of = _files(path, split)
        self._files = [(file, *facts_of(file)) for file in files]  # (path, rows, columns)
        names = {column for _, _, schema in self._files for column in schema}
        if not {"conversations", "messages", "question"} & names:
            raise UserError(
                f"{path}: needs a column conversations, messages or question; has {sorted(names)}"
            )
        # pictures may be hundreds of gigabytes: sizes and schemas stand for the content
        facts = [(file.name, file.stat().st_size, rows, *s) for file, rows, s in self._files]
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(rows for _, rows, _ in self._files)

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        first = 0
        for file, num_rows, _ in self._files:
            low, high = max(start - first, 0), min(stop - first, num_rows)
            if low < high:
                read = _parquet_rows if file.suffix == ".parquet" else _arrow_rows
                for item in read(file, low, high):
                    try:
                        yield _sample(item)
                    except SampleError as error:
                        yield error
            first += num_rows


def _sample(item: dict[str, Any]) -> RawSample:
    item = {key: value for key, value in item.items() if value is not None}
    pictures = [_picture(value) for value in _values(item)]
    return RawSample(
        images=pictures,
        messages=to_messages(item, len(pictures)),
        kind=kind_of(item, "parquet"),
        answers=scored_answers(item),
        source_id=id_of(item),
    )


def _values(item: dict[str, Any]) -> list[Any]:
    value = item.get("image", item.get("images"))
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _picture(value: Any) -> tuple[str, bytes]:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        path = value.get("path") if isinstance(value, dict) else None
        raise SampleError("image_missing", f"no bytes in the row (path {path!r:.120})")
    return with_extension(data)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--format parquet needs pyarrow: pip install genrecal_ds[parquet]"
        ) from None
    return pyarrow


Facts = tuple[int, list[str]]  # number of rows, and of columns the names


def _files(path: Path, split: str | None) -> tuple[list[Path], Callable[[Path], Facts]]:
    """The data files in order, and how to read one's facts."""
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise UserError(f"{path}: a DatasetDict; choose --split of {', '.join(splits)}")
        path = path / str(split)
    elif split is not None:
        raise UserError(f"--split {split}: {path} is no DatasetDict; leave --split out")
    if (path / "state.json").is_file():
        listed = read_json(path / "state.json").get("_data_files", [])
        files = [path / Path(str(entry.get("filename"))).name for entry in listed]
        read = _arrow_facts
    else:
        files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
        read = _parquet_facts
    if not files or not all(file.is_file() for file in files):
        missing = [file.name for file in files if not file.is_file()] or "any .parquet file"
        raise UserError(f"{path}: lacks {missing}; name a .parquet file or a folder of them")
    return files, read


def _parquet_facts(path: Path) -> Facts:
    arrow = _arrow()
    try:
        metadata = arrow.parquet.read_metadata(path)
        return metadata.num_rows, metadata.schema.to_arrow_schema().names
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {error}") from None


def _parquet_rows(path: Path, low: int, high: int) -> Iterator[dict[str, Any]]:
    arrow = _arrow()
    with arrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        groups: list[int] = []
        first = skip = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < high and low < first + rows:
                skip = low - first if not groups else skip
                groups.append(group)
            first += rows
        batches = file.iter_batches(BATCH_ROWS, groups, columns, use_threads=False)
        yield from _wanted(batches, skip, high - low)


def _arrow_facts(path: Path) -> Facts:
    arrow = _arrow()
    try:
        with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as stream:
            names = stream.schema.names
            return sum(batch.num_rows for batch in stream), names
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not an Arrow stream: {error}") from None


def _arrow_rows(path: Path, low: int, high: int) -> Iterator[dict[str, Any]]:
    """A memory-mapped stream: passing over a batch touches its header only."""
    arrow = _arrow()
    with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as stream:
        columns = [name for name in stream.schema.names if name in COLUMNS]
        small = (
            batch.select(columns).slice(first, BATCH_ROWS)
            for batch in stream
            for first in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _wanted(small, low, high - low)


def _wanted(batches: Any, skip: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows as dicts, after passing over `skip`."""
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        rows = batch.slice(skip, count).to_pylist()
        yield from rows
        skip, count = 0, count - len(rows)
        if count == 0:
            return
