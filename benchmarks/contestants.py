"""Readers of the same samples: ours, webdataset, mosaicml-streaming.

Each yields, for every sample, what a consumer in the main process gets to touch. mosaicml-streaming
imports torchvision for datasets that are not used here; where there is none, two names stand in.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, Dataset

from genrecal_ds.data.decode import decode_image, decode_record
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.pair import Pair
from genrecal_ds.data.reader import ShardReader

BATCH = 32
Members = dict[str, bytes]
Prepare = Callable[[Members], Any]  # what a worker makes of a sample's bytes


def import_streaming() -> Any | None:
    """The streaming package, or None where it is not installed."""
    if importlib.util.find_spec("streaming") is None:
        return None
    stand_ins = ("torchvision", "torchvision.datasets", "torchvision.transforms",
                 "torchvision.transforms.functional")  # fmt: skip
    if "streaming" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        import transformers.utils

        transformers.utils.is_torchvision_available()  # asked and remembered before they stand in
        modules: dict[str, Any] = {name: types.ModuleType(name) for name in stand_ins}
        for name, module in modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        modules["torchvision.datasets"].VisionDataset = object
        modules["torchvision.transforms.functional"].to_tensor = None
        sys.modules.update(modules)
    import streaming

    for name in stand_ins:
        if getattr(sys.modules.get(name), "__file__", None) is None:
            sys.modules.pop(name, None)
    return streaming


class OurBatches(Dataset):
    """Item = the samples of one batch of numbers."""

    def __init__(self, reader: ShardReader, batches: Sequence[Sequence[int]], prepare: Any) -> None:
        self.reader, self.batches, self.prepare = reader, batches, prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        samples = self.reader.members_many(self.batches[number])
        return [self.prepare(sample) for sample in samples] if self.prepare else samples


@dataclass
class Ours:
    """genrecal_ds: byte ranges by index, crc32 checked, parsed by webdataset's functions."""

    folder: Path
    is_random: bool

    @property
    def name(self) -> str:
        return f"ours, {'random' if self.is_random else 'sequential'} order"

    def samples(self, num_workers: int, prepare: Prepare | None) -> Iterator[Any]:
        index = ShardIndex.load(self.folder)
        reader = ShardReader(index)
        order = np.arange(len(index))
        if self.is_random:
            order = np.random.default_rng(0).permutation(order)
        batches = [order[first : first + BATCH].tolist() for first in range(0, len(order), BATCH)]
        if num_workers == 0:
            for batch in batches:
                for members in reader.members_many(batch):
                    yield prepare(members) if prepare else members
            return
        loader = DataLoader(
            OurBatches(reader, batches, prepare), batch_size=None, num_workers=num_workers
        )
        for batch in loader:
            yield from batch


@dataclass
class Webdataset:
    """webdataset as its users run it: sequential shards, split over workers, batched."""

    folder: Path
    name: str = "webdataset"

    def samples(self, num_workers: int, prepare: Prepare | None) -> Iterator[Any]:
        urls = [str(path) for path in sorted(self.folder.glob("*.tar"))]
        dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
        stage = dataset.map(prepare) if prepare else dataset
        if num_workers == 0:
            yield from stage
            return
        batched = stage.batched(BATCH, collation_fn=_as_list)
        for batch in DataLoader(batched, batch_size=None, num_workers=num_workers):
            yield from batch


@dataclass
class Streaming:
    """mosaicml-streaming over MDS shards written from the same members."""

    folder: Path
    name: str = "mosaicml-streaming"

    def samples(self, num_workers: int, prepare: Prepare | None) -> Iterator[Any]:
        streaming = import_streaming()
        assert streaming is not None
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(
            local=str(self.folder), shuffle=False, batch_size=BATCH
        )
        source = _Mapped(dataset, prepare) if prepare else dataset
        if num_workers == 0:
            yield from source
            return
        loader = DataLoader(source, batch_size=BATCH, num_workers=num_workers, collate_fn=_as_list)
        for batch in loader:
            yield from batch


class _Mapped(torch.utils.data.IterableDataset):
    def __init__(self, dataset: Any, prepare: Prepare) -> None:
        self.dataset, self.prepare = dataset, prepare

    def __iter__(self) -> Iterator[Any]:
        return map(self.prepare, self.dataset)


def write_mds(folder: Path, samples: Sequence[Members]) -> None:
    """The samples as MDS shards of about the size of ours."""
    streaming = import_streaming()
    assert streaming is not None
    columns = dict.fromkeys(samples[0], "bytes")
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=2**25) as writer:
        for sample in samples:
            writer.write(sample)


@dataclass
class PreparePair:
    """Record and JPEG decoded, both tokenisations made: the same functions for everyone."""

    encoders: PairEncoders

    def __call__(self, members: Members) -> Pair:
        record = decode_record(bytes(members["json"]))
        image = decode_image(bytes(members["0.jpg"]), "jpg")
        return self.encoders.encode(record.messages, [image])


def _as_list(items: Any) -> Any:
    return list(items)
