"""Knows this process's rank and offers the few collectives; works without a process group."""

import functools
import gc
import os
import socket
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from genrecal_ds.errors import UserError


def is_initialized() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return torch_dist.get_world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_initialized():
        torch_dist.barrier()


def leave() -> None:
    """Leave the process group together: a rank that leaves early resets its peers' sockets."""
    if is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()
        # Engines leave cycles that keep the group, and so gloo's threads, until the interpreter
        # ends. A thread that still runs then aborts the process, rarely, after all work is done.
        gc.collect()


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce in place; with one rank return the tensor unchanged."""
    if is_initialized():
        torch_dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value on every rank. Values are pickled, so they should be small."""
    if not is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


@functools.cache
def host_group() -> torch_dist.ProcessGroup | None:
    """Return the group of this host's ranks; None for a single host. A collective, once."""
    names = gather_objects(socket.gethostname())
    if len(set(names)) == 1:
        return None
    own = None
    for name in dict.fromkeys(names):  # every rank makes every group, in one order
        group = torch_dist.new_group([r for r, of_rank in enumerate(names) if of_rank == name])
        own = group if name == socket.gethostname() else own
    return own


def from_main(value: Any) -> Any:
    """Return the main rank's value on every rank; the other ranks' values are ignored."""
    if not is_initialized():
        return value
    values = [value]
    torch_dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_together(message: str | None) -> None:
    """Raise UserError on every rank if any rank has a message: else the others would wait."""
    messages = [text for text in gather_objects(message) if text]
    if messages:
        raise UserError(messages[0])


def device() -> torch.device:
    """Return the accelerator that this rank drives, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def local_gpus() -> list[int]:
    """List the memory in bytes of each GPU of this machine; empty without a GPU."""
    count = torch.cuda.device_count()
    return [torch.cuda.get_device_properties(i).total_memory for i in range(count)]


def synchronize() -> None:
    """Wait for the device, so that a clock read afterwards includes the device's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
