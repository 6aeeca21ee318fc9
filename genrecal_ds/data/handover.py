"""Hands a micro-batch from a data worker to its rank as one block of memory, whatever is in it.

torch hands every tensor of a worker over as a file descriptor of its own, which stays open for as
long as the tensor lives. A step of 64 micro-batches of 25 tensors would hold 1,600 of them, and
many systems allow a process 1,024: the run ends with "received 0 items of ancdata". Raising the
limit helps only below the hard one, and torch's other way, files in /dev/shm, leaves them behind
when a job is killed. So a worker packs a micro-batch's tensors into one, and the rank copies that
one into memory of its own: what stays open is a descriptor for each micro-batch on the way.
"""

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch aligns memory of its own


class Block(NamedTuple):
    """Any object with tensors in it. torch may share or pin it as it does every batch."""

    data: Tensor  # uint8: the tensors' bytes, one behind the other
    rest: bytes  # the object pickled, with a place in `data` where each tensor was


class _Place(NamedTuple):
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parts: list[tuple[_Place, Tensor]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> _Place | None:
        if not isinstance(value, Tensor):
            return None
        place = _Place(self.size, self.size + value.nbytes, value.dtype, tuple(value.shape))
        self.parts.append((place, value))
        self.size = -(-place.end // ALIGNMENT) * ALIGNMENT
        return place


class _Unpacker(pickle.Unpickler):
    def __init__(self, block: Block):
        super().__init__(io.BytesIO(block.rest))
        self._data = block.data

    def persistent_load(self, place: _Place) -> Tensor:
        return self._data[place.start : place.end].view(place.dtype).view(place.shape)


def packed(value: Any) -> Block:
    """Copy an object's tensors, which are on the CPU, into one block. Runs in the worker."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    data = torch.empty(packer.size, dtype=torch.uint8)
    for place, tensor in packer.parts:
        flat = tensor.detach().contiguous().view(-1)
        data[place.start : place.end] = flat.view(torch.uint8)
    return Block(data, file.getvalue())


def unpacked(block: Block) -> Any:
    """Give back what was packed, its tensors views of one block that no worker shares. Runs in the
    rank."""
    data = block.data if block.data.is_pinned() else block.data.clone()
    return _Unpacker(block._replace(data=data)).load()
