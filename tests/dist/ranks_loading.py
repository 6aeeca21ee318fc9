"""Run on every rank: load a folder sharded, gather it again, compare bit by bit.

ranks_loading.py FOLDER [FOLDER ...]
"""

import sys
from pathlib import Path

import torch
from deepspeed import zero

from genrecal_ds import dist
from genrecal_ds.models.config_file import auto_class, read_config
from genrecal_ds.models.tensor_files import Checkpoint
from genrecal_ds.training import engine
from genrecal_ds.training.weights import DTYPES, load_vlm_sharded


def check(folder: str, precision: str) -> None:
    read = 0
    original = Checkpoint.flat_range

    def counting(self, name, start, stop):
        nonlocal read
        read += stop - start
        return original(self, name, start, stop)

    Checkpoint.flat_range = counting
    vlm = load_vlm_sharded(folder, "student_zero3", precision)
    Checkpoint.flat_range = original

    family = auto_class(read_config(folder))
    expected = family.from_pretrained(folder, dtype=DTYPES[precision])
    truth = dict(expected.named_parameters())  # a tied pair once: ties are the same
    assert dict(vlm.model.named_parameters()).keys() == truth.keys()
    total = 0
    for name, parameter in vlm.model.named_parameters():
        total += parameter.ds_numel
        if dist.world_size() > 1:
            assert parameter.ds_tensor.numel() < parameter.ds_numel, name
        with zero.GatheredParameters([parameter]):
            assert parameter.dtype == DTYPES[precision]
            assert torch.equal(parameter.detach(), truth[name]), name
    buffers = dict(expected.named_buffers())
    for name, buffer in vlm.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
    share = read / total
    assert share < 1.02 / dist.world_size() + 0.01, f"rank {dist.rank()} read {share:.2f}"


def main() -> None:
    engine.start()
    for folder in sys.argv[1:]:
        for precision in ("fp32", "bf16"):
            check(folder, precision)
    dist.leave()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert not any("gloo" in name for name in threads), f"the group outlives leave(): {threads}"


if __name__ == "__main__":
    main()
