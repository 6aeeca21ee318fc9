"""Streams parquet files and Hugging Face `save_to_disk` folders through pyarrow.

Files are memory-mapped and read a few rows at a time, so a row group of many gigabytes is never
held whole. Where pages are compressed, the page in use is held; pyarrow writes up to 1024 rows a
page. Only plain Arrow types are read. A path without bytes is never opened, and a URL is never
fetched.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.sources import RawSample
from data_tools.sources.files import read_json
from data_tools.sources.items import READ_KEYS, TEACHING_KEYS, Items
from data_tools.sources.keys import METADATA, is_content
from data_tools.sources.pictures import NAME_KEYS, PICTURE_KEYS, PictureReader
from data_tools.sources.splits import choose, files_of
from genrecal_ds.data.decode import SampleError
from genrecal_ds.errors import UserError

BATCH_ROWS = 16
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
COLUMNS = READ_KEYS | {*PICTURE_KEYS, *NAME_KEYS}


def open_source(path: str, *, split: str | None = None, ignore: Sequence[str] = ()) -> "Parquet":
    """path: a .parquet file, a folder of them, or a save_to_disk folder.

    split: of a DatasetDict or of a folder as hubs lay it out. ignore: columns to leave out.
    Columns: pictures (struct {bytes, path}, a list of those, or bytes), and turns or a question.
    """
    return Parquet(Path(path), split, ignore)


class Facts(NamedTuple):
    """The facts in the head and foot of one file."""

    num_rows: int
    columns: list[str]
    stamp: bytes  # the parquet footer, or the Arrow schema


class Layout(NamedTuple):
    """How one kind of file is read: its facts, and its rows [low, high)."""

    facts: Callable[[Path], Facts]
    rows: Callable[[Path, int, int, Sequence[str]], Iterator[dict[str, Any] | SampleError]]


class Parquet:
    """Rows are the files' rows, files by name (or in state.json's order).

    digest covers the files' names, sizes and footers (Arrow: schemas and row counts), not every
    byte: pictures may be hundreds of gigabytes. A footer holds each column chunk's place and
    size; bytes changed inside a chunk and nowhere else go unseen.
    """

    name = "parquet"

    def __init__(self, path: Path, split: str | None, ignore: Sequence[str] = ()) -> None:
        files, self._layout = _files(path, split)
        self._ignored = frozenset(ignore)
        self._items = Items(self.name, str(path), PictureReader(None), ignore)
        self._files = [(file, self._layout.facts(file)) for file in files]
        columns = {name for _, facts in self._files for name in facts.columns}
        if not TEACHING_KEYS & columns:
            raise UserError(
                f"{path}: needs a column conversations, messages, texts, question or caption; has "
                f"{sorted(columns)}"
            )
        digest = hashlib.sha256()
        for file, facts in self._files:
            identity = (file.name, file.stat().st_size, facts.num_rows, len(facts.stamp))
            digest.update(repr(identity).encode() + facts.stamp)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return sum(facts.num_rows for _, facts in self._files)

    def rows(self, start: int, stop: int) -> Iterator[RawSample | SampleError]:
        first = 0
        for file, facts in self._files:
            low, high = max(start - first, 0), min(stop - first, facts.num_rows)
            if low < high:
                yield from self._rows_of(file, facts, low, high)
            first += facts.num_rows

    def _rows_of(
        self, file: Path, facts: Facts, low: int, high: int
    ) -> Iterator[RawSample | SampleError]:
        # what is neither read nor looks like content is not even loaded
        wanted = [name for name in facts.columns if name not in self._ignored and is_wanted(name)]
        unread = sorted(set(facts.columns) - set(wanted) - METADATA)
        num_rows = 0
        try:
            for item in self._layout.rows(file, low, high, wanted):
                num_rows += 1
                try:
                    if isinstance(item, SampleError):
                        yield item
                    else:
                        yield self._items.sample(item, unread=unread)
                except SampleError as error:
                    yield error
        except (_arrow().ArrowException, OSError, UnicodeDecodeError) as error:
            # a broken page ends the file: how many rows it held is unknown
            raise UserError(f"{file}: damaged: {_one_line(error)}; fetch it again") from None
        if num_rows != high - low:
            raise UserError(f"{file}: damaged: fewer rows than its footer says; fetch it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def is_wanted(column: str) -> bool:
    """Whether a column is loaded: what is read, and what must not be lost in silence."""
    return column in COLUMNS or column in METADATA or is_content(column)


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


def _files(path: Path, split: str | None) -> tuple[list[Path], Layout]:
    """The data files in order, and how to read them."""
    if (path / "dataset_dict.json").is_file():
        splits = [str(name) for name in _listed(path / "dataset_dict.json", "splits")]
        folders = {name: [path / _plain_name(path, name)] for name in splits}
        chosen = choose(path, folders, split)
        return [file for folder in chosen for file in _saved_files(folder)], _ARROW
    if (path / "state.json").is_file():
        return choose(path, {"": _saved_files(path)}, split), _ARROW
    return files_of(path, ".parquet", split), _PARQUET


def _saved_files(folder: Path) -> list[Path]:
    """The files of one save_to_disk folder."""
    entries = _listed(folder / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    files = [folder / _plain_name(folder, name) for name in names]
    if not files or not all(file.is_file() for file in files):
        missing = [file.name for file in files if not file.is_file()] or "any file"
        raise UserError(f"{folder}: lacks {missing}; save the dataset again")
    return files


def _listed(path: Path, key: str) -> list[Any]:
    content = read_json(path)
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list):
        raise UserError(f"{path}: has no list {key}; save the dataset again")
    if content.get("_indices_data_files"):
        # rows of the files would be another selection, in another order, than the dataset's
        raise UserError(f"{path}: holds _indices_data_files; flatten_indices() and save again")
    return values


def _plain_name(folder: Path, name: Any) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{folder}: {name!r:.80} is not a name inside it; save the dataset again")
    return name


def _parquet_facts(path: Path) -> Facts:
    arrow = _arrow()
    try:
        metadata = arrow.parquet.read_metadata(path)
        columns = metadata.schema.to_arrow_schema().names
        with path.open("rb") as file:
            file.seek(-(metadata.serialized_size + 8), os.SEEK_END)
            return Facts(metadata.num_rows, columns, file.read())
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a parquet file: {_one_line(error)}; fetch it again") from None


def _parquet_rows(
    path: Path, low: int, high: int, columns: Sequence[str]
) -> Iterator[dict[str, Any] | SampleError]:
    arrow = _arrow()
    # not mapped, a whole column chunk is read at once, which is a row group's pictures; with
    # buffer_size, mapped or not, still a whole page of them
    with arrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        groups: list[int] = []
        first = skip = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < high and low < first + rows:
                skip = low - first if not groups else skip
                groups.append(group)
            first += rows
        batches = file.iter_batches(BATCH_ROWS, groups, list(columns), use_threads=False)
        yield from _wanted(batches, skip, high - low)


def _open_stream(source: Any) -> Any:
    # its threads would not survive the fork into the build's workers
    ipc = _arrow().ipc
    return ipc.open_stream(source, options=ipc.IpcReadOptions(use_threads=False))


def _arrow_facts(path: Path) -> Facts:
    arrow = _arrow()
    try:
        with path.open("rb") as file:
            file.seek(-len(_STREAM_END), os.SEEK_END)
            has_end = file.read() == _STREAM_END
        with arrow.memory_map(str(path)) as source, _open_stream(source) as stream:
            stamp, columns = stream.schema.serialize().to_pybytes(), stream.schema.names
            num_rows = sum(batch.num_rows for batch in stream)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not an Arrow stream: {_one_line(error)}; fetch it again"
        ) from None
    if not has_end:
        # pyarrow takes a stream cut between two batches for a whole one
        raise UserError(f"{path}: cut off: no end-of-stream mark; fetch or save it again")
    return Facts(num_rows, columns, stamp)


def _arrow_rows(
    path: Path, low: int, high: int, columns: Sequence[str]
) -> Iterator[dict[str, Any] | SampleError]:
    """A memory-mapped stream: passing over a batch touches its header only."""
    with _arrow().memory_map(str(path)) as source, _open_stream(source) as stream:
        small = (
            batch.select(list(columns)).slice(first, BATCH_ROWS)
            for batch in stream
            for first in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _wanted(small, low, high - low)


def _wanted(batches: Any, skip: int, count: int) -> Iterator[dict[str, Any] | SampleError]:
    """`count` rows as dicts, after passing over `skip`."""
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        rows = batch.slice(skip, count)
        yield from _dicts(rows)
        skip, count = 0, count - rows.num_rows
        if count == 0:
            return


def _dicts(batch: Any) -> list[dict[str, Any] | SampleError]:
    """Turn rows into dicts after a check: a hostile file's offsets could point anywhere."""
    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except (_arrow().ArrowException, UnicodeDecodeError) as error:
        if batch.num_rows == 1:
            return [SampleError("arrow_data", _one_line(error))]
        return [row for number in range(batch.num_rows) for row in _dicts(batch.slice(number, 1))]


_PARQUET = Layout(_parquet_facts, _parquet_rows)
_ARROW = Layout(_arrow_facts, _arrow_rows)
