"""Loads a frozen model whole on this rank, in full precision or in 8 bits.

The model is filled module by module, so host memory grows with what is kept, not with the whole
model in full precision.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.initialization import no_init_weights

from genrecal_ds.errors import UserError
from genrecal_ds.models.derived import blocks_in
from genrecal_ds.models.loading import find_sources, load_buffers
from genrecal_ds.models.tensor_files import Checkpoint
from genrecal_ds.models.vlm import VLM


def load_replica(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    int8: bool = False,
    pack: bool | None = False,
    attention: str | None = None,
) -> VLM:
    """Load a frozen VLM on `device`.

    int8: the weights of the decoder's linear layers become 8-bit integers with a scale per row
    (torchao) and are multiplied in `dtype`.

    Raises UserError where torchao is missing.
    """
    with no_init_weights():  # pages of a weight that nobody wrote take no memory
        vlm = VLM.from_config(folder, dtype, pack, attention).requires_grad_(False).eval()
    quantize = int8_quantizer() if int8 else None
    sources = find_sources(vlm.model, Checkpoint(folder))
    in_decoder = set(map(id, blocks_in(vlm.model.get_decoder()).modules()))
    load_buffers(vlm.model, sources)
    filled: set[int] = set()  # of tied weights, which two modules share
    for prefix, module in vlm.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                filled.add(id(parameter))
                full_name = f"{prefix}.{name}" if prefix else name
                parameter.data.copy_(sources[full_name].tensor())
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        if quantize and isinstance(module, nn.Linear) and id(module) in in_decoder:
            quantize(module)
    return vlm


class Int8Linear(nn.Linear):
    """A linear layer whose weight torchao holds in 8 bits and which is widened for each call.

    torchao's own multiplication needs torch's F.linear, which DeepSpeed's ZeRO-3 replaces in the
    whole process.
    """

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight.dequantize(), self.bias)


def int8_quantizer() -> Callable[[nn.Linear], None]:
    """Turns a linear layer into one of 8 bits. Raises UserError where torchao is missing."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError(
            "teacher.placement: replica_int8 needs torchao: pip install torchao"
        ) from None

    def quantize(module: nn.Linear) -> None:
        quantize_(module, Int8WeightOnlyConfig())
        module.__class__ = Int8Linear

    return quantize
