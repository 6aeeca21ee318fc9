"""Keeps a frozen teacher's rows on disk: computed once, read by any number of runs.

    FOLDER/identity.json              what the rows belong to; a reader with another one is refused
    FOLDER/rank0000-000007.safetensors  one block: rows of some samples, whole or not there

A sample has, for each turn in order, the row that predicts the first answer token, the rows of the
answer tokens, and these tokens' ids. A sample that the pair could not use has no rows. The cache
holds nothing of the student's tokens, so one cache serves many students.

Rows are stored as they were computed. Where the identity says `rows: int8`, they are stored in 8
bits with one scale for every 64 numbers. A teacher's rows have a few numbers far larger than the
others; with such scales a large number costs only its own 64 precision (docs/performance.md).

Shapes: R rows of a sample (answer tokens + turns), H teacher width, S samples of a block.
"""

import json
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genrecal_ds.data.pair import EncodedChat, is_taught
from genrecal_ds.errors import UserError

IDENTITY = "identity.json"
FORMAT = 1
BLOCK_BYTES = 2**28  # a block is handed to the disk when its rows are this large
SCALED_TOGETHER = 64  # numbers
_TABLES = ("samples", "rows_of", "turns_of", "crc32")


class Features(NamedTuple):
    """One sample's rows, answer tokens and turns."""

    rows_RH: Tensor
    tokens_R: Tensor  # int64; in front of each turn a 0, for the row that stands before it
    turn_lengths: tuple[int, ...]  # answer tokens, end-of-turn included


class CachedView:
    """Presents one sample's cached rows as a side of a pair: an Encoder that encodes nothing."""

    max_length, reads_images, digest = 2**62, True, ""
    vision_rules = {"rows": "rows"}

    def __init__(self, features: Features):
        self.features = features

    def encode(self, messages: list, images: list, last_turn: bool = False) -> EncodedChat:
        """Return the answers, each behind a single token that stands for its question, with their
        rows; last_turn: those of the last turn of `messages` alone."""
        rows, tokens, lengths = self.features
        if last_turn:
            turn = sum(map(is_taught, messages)) - 1
            start = sum(lengths[:turn]) + turn
            end, lengths = start + 1 + lengths[turn], lengths[turn : turn + 1]
            rows, tokens = rows[start:end], tokens[start:end]
        spans, start = [], 0
        for length in lengths:
            spans.append((start + 1, start + 1 + length))
            start += 1 + length
        return EncodedChat(tokens, tuple(spans), {}, {"rows": rows})

    def rewrites(self, messages: list) -> bool:
        """Say no: rows are of a turn, in whatever sequence the teacher read it."""
        return False


def kept_rows(chat: EncodedChat) -> EncodedChat:
    """Leave out the cached rows of turns that the pair's rules left out."""
    return replace(chat, vision={"rows": chat.vision["rows"][: len(chat.input_ids_T)]})


class FeatureWriter:
    """Writes one rank's blocks. A thread writes to the disk; its errors are raised by flush."""

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int):
        self.folder, self.rank = folder, rank
        self._in_8_bits = identity.get("rows") == "int8"
        _claim(folder, identity, rank)
        self._store = FeatureStore(folder, identity)  # what was there before
        self._added: set[int] = set()
        self._waiting: list[tuple[int, Features]] = []
        self._waiting_bytes = 0
        self._number = 1 + max(
            (int(path.stem.split("-")[1]) for path in folder.glob(f"rank{rank:04d}-*")), default=-1
        )
        self._disk = ThreadPoolExecutor(1)
        self._pending: list[Future] = []

    def missing(self, samples: np.ndarray) -> np.ndarray:
        """int64, sorted: those in `samples` that had no rows at the start and got none since."""
        added = np.fromiter(self._added, np.int64)
        return np.setdiff1d(samples, np.concatenate([self._store.samples, added]))

    @property
    def failed(self) -> bool:
        """Whether a block could not be written; flush says why."""
        return any(pending.done() and pending.exception() for pending in self._pending)

    def add(self, sample: int, features: Features) -> None:
        """Keep one sample's rows, on the CPU; a sample that has rows already is left as it is."""
        if sample in self._added or self._store.find(sample) is not None:
            return
        self._added.add(sample)
        self._waiting.append((sample, features))
        self._waiting_bytes += features.rows_RH.nbytes
        if self._waiting_bytes >= BLOCK_BYTES:
            self._hand_over()

    def flush(self) -> None:
        """Write everything added so far to disk. Raises OSError, also for earlier blocks."""
        self._hand_over()
        for pending in self._pending:
            pending.result()
        self._pending.clear()

    def _hand_over(self) -> None:
        self._pending = [p for p in self._pending if not p.done() or p.exception()]
        if self._waiting:
            path = self.folder / f"rank{self.rank:04d}-{self._number:06d}.safetensors"
            self._pending.append(self._disk.submit(self._write, path, self._waiting))
            self._number += 1
            self._waiting, self._waiting_bytes = [], 0

    def _write(self, path: Path, samples: list[tuple[int, Features]]) -> None:
        _write_block(path, samples, self._in_8_bits)


class FeatureStore:
    """Reads samples in any order, from any process. Opened once, forked or pickled to workers."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        """Raises UserError for a folder of another teacher, template or data, and names which."""
        self.folder, self.identity = folder, identity
        self._parts = ("rows", "scales") if identity.get("rows") == "int8" else ("rows",)
        _check_identity(folder, identity)
        self._paths = sorted(folder.glob("rank*.safetensors"))
        tables = [_read_tables(path) for path in self._paths]
        sizes = [len(table["samples"]) for table in tables]
        # Arrays, not a dict: millions of samples, in every worker.
        self._block = np.repeat(np.arange(len(tables), dtype=np.int32), sizes)
        self._row, self._turn = (
            _ends([table[name] for table in tables]) for name in ("rows_of", "turns_of")
        )
        samples = _joined([table["samples"] for table in tables])
        self._order = np.argsort(samples, kind="stable")
        self.samples = samples[self._order]  # int64, sorted
        self._rows_of = _joined([table["rows_of"] for table in tables])
        self._turns_of = _joined([table["turns_of"] for table in tables])
        self._crc32 = _joined([table["crc32"] for table in tables])
        if (twice := np.flatnonzero(self.samples[1:] == self.samples[:-1])).size:
            second = self._order[twice[0] + 1]
            path = self._paths[self._block[second]]
            raise UserError(f"{path}: sample {samples[second]} is in two blocks; remove one")

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.folder, self.identity)

    def find(self, sample: int) -> int | None:
        """Find where a sample's entry is; None when no block has it."""
        place = int(np.searchsorted(self.samples, sample))
        is_there = place < len(self.samples) and self.samples[place] == sample
        return int(self._order[place]) if is_there else None

    def read(self, sample: int) -> Features | None:
        """Read one sample's rows; None for a sample that the pair could not use.

        Raises UserError naming the block when its bytes are not those that were written.
        """
        entry = self.find(sample)
        assert entry is not None, "the stage has seen to it that every sample it asks for is there"
        count, turns, path = self._rows_of[entry], self._turns_of[entry], self._path(entry)
        if not count:
            return None
        last, last_turn = self._row[entry], self._turn[entry]
        first, first_turn = last - count, last_turn - turns
        try:
            with safe_open(path, "pt") as block:
                parts = [block.get_slice(name)[first:last] for name in self._parts]
                dtype = (block.metadata() or {}).get("dtype", "")
                tokens = block.get_slice("tokens")[first:last]
                lengths = block.get_slice("turn_lengths")[first_turn:last_turn]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); remove it and cache again"
            ) from None
        if _crc32(*parts, tokens) != self._crc32[entry]:
            raise UserError(f"{path}: sample {sample} is damaged; remove the file and cache again")
        rows = parts[0]
        if len(parts) > 1:
            rows = widened(parts[0], parts[1], getattr(torch, dtype))
        return Features(rows, tokens.long(), tuple(lengths.tolist()))

    def _path(self, entry: int) -> Path:
        return self._paths[self._block[entry]]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _ends(counts: list[np.ndarray]) -> np.ndarray:
    """int64: where each sample's part of its block ends."""
    return _joined([np.cumsum(of_block) for of_block in counts])


def in_8_bits(rows_RH: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [R, H], fp32 scales [R, H / 64]): the largest of each 64 numbers becomes 127."""
    width = rows_RH.shape[1]
    padded = F.pad(rows_RH.float(), (0, -width % SCALED_TOGETHER))
    groups = padded.unflatten(1, (-1, SCALED_TOGETHER))
    scales = groups.abs().amax(-1) / 127
    whole = (groups / scales.clamp(min=1e-30)[..., None]).round().to(torch.int8)
    return whole.flatten(1)[:, :width].contiguous(), scales


def widened(whole_RH: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn what in_8_bits made back into rows [R, H]."""
    repeated = scales.repeat_interleave(SCALED_TOGETHER, 1)[:, : whole_RH.shape[1]]
    return (whole_RH.float() * repeated).to(dtype)


def _write_block(path: Path, samples: list[tuple[int, Features]], is_in_8_bits: bool) -> None:
    """Write one block, complete or not at all."""
    written = [features for _, features in samples]
    stored = [in_8_bits(of.rows_RH) if is_in_8_bits else (of.rows_RH,) for of in written]
    integers = {
        "samples": [sample for sample, _ in samples],
        "rows_of": [len(features.rows_RH) for features in written],
        "turns_of": [len(features.turn_lengths) for features in written],
        "turn_lengths": [length for features in written for length in features.turn_lengths],
        "crc32": [
            _crc32(*parts, features.tokens_R.int())
            for parts, features in zip(stored, written, strict=True)
        ],
    }
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in integers.items()}
    for name, parts in zip(("rows", "scales"), zip(*stored, strict=True), strict=False):
        tensors[name] = torch.cat(parts)
    tensors["tokens"] = torch.cat([features.tokens_R for features in written]).int()
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, {"dtype": str(written[0].rows_RH.dtype).split(".")[1]})
    except SafetensorError as error:  # how it tells of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_tables(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "pt") as block:
            return {name: block.get_tensor(name).numpy() for name in _TABLES}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and cache again") from None


def _crc32(*tensors: Tensor) -> int:
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def _claim(folder: Path, identity: dict[str, Any], rank: int) -> None:
    """Write the identity of a new folder; several ranks may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / IDENTITY
    if not path.is_file():
        temporary = folder / f"{IDENTITY}.{rank}.tmp"  # pids of two hosts may be equal
        temporary.write_text(json.dumps({"format": FORMAT, **identity}, indent=2) + "\n")
        os.replace(temporary, path)


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / IDENTITY
    if not path.is_file():
        raise UserError(f"teacher.cache: {folder} has no {IDENTITY}; run the stage that writes it")
    recorded = json.loads(path.read_text())
    wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
    for key in sorted(recorded.keys() | wanted.keys()):
        if recorded.get(key) != wanted.get(key):
            raise UserError(
                f"{path}: its rows belong to {key} {recorded.get(key)!r}, this run has "
                f"{wanted.get(key)!r}; name another teacher.cache"
            )
