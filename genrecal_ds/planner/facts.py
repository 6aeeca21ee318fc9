"""Lists what a plan knows beforehand: GPUs, models by name, the paper's figures.

Rates are the maker's nominal rates. Bandwidths are what collectives reach (nccl-tests' bus
bandwidth): four fifths of nominal, a guess that --link and --net replace. A GB is 1e9 bytes.
"""

import shutil
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from genrecal_ds.errors import UserError


class Gpu(NamedTuple):
    """One GPU, and its share of a host of eight."""

    tflops: float  # dense bf16, 1e12 a second
    gib: float
    memory_gbs: float
    link: float  # GB/s that a collective within a host brings each GPU
    net: float  # GB/s that a collective over hosts brings a host
    host_link: float  # GB/s between one GPU and its host's memory
    host_gib: float


GPUS = {
    "a100-40g": Gpu(312, 40, 1555, 240, 160, 20, 1000),
    "a100-80g": Gpu(312, 80, 2039, 240, 160, 20, 1000),
    "h100-80g": Gpu(989, 80, 3350, 360, 320, 40, 2000),
    "h200-141g": Gpu(989, 140, 4800, 360, 320, 40, 2000),
    "b200-180g": Gpu(2250, 180, 8000, 720, 320, 40, 2000),
    "l40s-48g": Gpu(362, 45, 864, 20, 40, 20, 1000),
}

# Section 4 of arXiv 2506.15681: forward TFLOP, its convention not given; hours on 128 A100-80GB.
PAPER_FORWARD = {
    "qwen2-vl-72b": 260.0, "qwen2-vl-7b": 25.7, "internvl2.5-78b": 269.0, "internvl2.5-8b": 27.1,
}  # fmt: skip
PAPER_PAIRS = (("qwen2-vl-72b", "qwen2-vl-7b"), ("internvl2.5-78b", "internvl2.5-8b"))
PAPER_RECALIBRATOR = {"qwen2-vl-7b": 2.27, "internvl2.5-8b": 2.2}
PAPER_HOURS = {"align": 3.1, "distill": 10.4}
PAPER_SAMPLES = {"align": 9e6, "distill": 9e6, "sft": 6e6}
PAPER_BATCH = {"align": 8192, "distill": 4096, "sft": 8192}
PAPER_GPUS = 128

_MODELS = files("genrecal_ds.planner") / "models"


def model_names() -> list[str]:
    return sorted(entry.name.removesuffix(".json") for entry in _MODELS.iterdir())


def model_folder(given: str, scratch: Path) -> Path:
    """Return a model folder as it is; for a config.json or a known name, make one in scratch.

    Raises UserError listing the names.
    """
    path = Path(given)
    if (path / "config.json").is_file():
        return path
    packaged = _MODELS / f"{given}.json"
    if not (path.suffix == ".json" and path.is_file()) and not packaged.is_file():
        raise UserError(
            f"{given}: no model folder, no config.json and no model known here; known: "
            f"{', '.join(model_names())}"
        )
    folder = scratch / path.name.removesuffix(".json")
    folder.mkdir(exist_ok=True)
    if path.is_file():
        shutil.copy(path, folder / "config.json")
    else:
        (folder / "config.json").write_text(packaged.read_text())
    return folder
