"""How many bytes the tensors of a piece of code hold at once, on any device."""

import weakref
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that still exist; `peak` by phase."""

    def __init__(self, phase: Callable[[], str] = str) -> None:
        super().__init__()
        self.phase = phase
        self.live = 0
        self.peak: dict[str, int] = defaultdict(int)
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        now = self.phase()
        self.peak[now] = max(self.peak[now], self.live)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage] = size
            self.live += size
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size
