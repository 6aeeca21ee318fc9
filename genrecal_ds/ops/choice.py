"""Chooses whether the Triton kernels run: one rule for both fused operations."""

import importlib.util
import os

import torch
from torch import Tensor


def chosen(impl: str, tensor: Tensor) -> str:
    """Return `triton` or `torch` for `auto`, else `impl` itself.

    Raises ValueError when impl is `triton` and Triton cannot run on this tensor: an explicit
    choice never falls back.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl: {impl!r}, expected auto, triton or torch")
    installed = importlib.util.find_spec("triton") is not None
    fits = tensor.is_cuda and tensor.dtype != torch.float64  # the kernels keep sums in fp32
    if impl == "auto":
        return "triton" if fits and installed else "torch"
    if impl == "triton" and not installed:
        raise ValueError("impl: triton is not installed; take auto or torch")
    if impl == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl: triton needs CUDA tensors (these are on {tensor.device}), or "
            f"TRITON_INTERPRET=1 to be interpreted"
        )
    if impl == "triton" and tensor.is_cuda and not fits:
        raise ValueError(f"impl: triton has no kernels for {tensor.dtype}; take auto or torch")
    return impl
