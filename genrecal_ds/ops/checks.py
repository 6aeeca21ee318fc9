"""Refuses bad tensors for all operations: one line names the argument and what would fit."""

from typing import Literal

import torch
from torch import Tensor

from genrecal_ds import IGNORE


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None | Literal["same"] = "same",
) -> None:
    """Refuse another shape, dtype ("same": of `like`; None: any float), device or layout."""
    expected = like.dtype if dtype == "same" else dtype
    fits_dtype = tensor.is_floating_point() if expected is None else tensor.dtype == expected
    if tensor.shape != shape or not fits_dtype or tensor.device != like.device:
        raise ValueError(
            f"{name}: {shown(tensor)}, expected {list(shape)} "
            f"{'of a float dtype' if expected is None else expected} on {like.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()}, expected a contiguous {list(shape)}")


def check_labels(labels_N: Tensor, columns: int) -> None:
    """Refuse labels outside the vocabulary, on the CPU only. On CUDA reading them would stall the
    stream, so the kernel makes the loss of a bad label NaN."""
    if labels_N.device.type != "cpu" or torch.compiler.is_compiling() or not labels_N.numel():
        return
    bad = (labels_N != IGNORE) & ((labels_N < 0) | (labels_N >= columns))
    if bad.any():
        raise ValueError(
            f"labels_N: {int(labels_N[bad][0])}, expected {IGNORE} or 0 to {columns - 1}"
        )


def shown(tensor: Tensor) -> str:
    """Return shape, dtype and device as text for a message."""
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
