"""A pair of real sizes with random weights, for timings on a GPU: models, shards, a recipe.

    python -m benchmarks.pair FOLDER [--teacher WIDTH LAYERS] [--student WIDTH LAYERS]

The demo's two families and tokenizers at other widths: by default a teacher of 3.9e9 parameters
and a student of 0.3e9. Prints the commands that train two stages, then time the second in every
place of the teacher.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml

from data_tools.builder import build
from data_tools.sources.digits import Digits
from launch.demo.pair import build_student, build_teacher

SAMPLES = 4000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", type=int, nargs=2, default=(3072, 30))
    parser.add_argument("--student", type=int, nargs=2, default=(1024, 20))
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=16)
    arguments = parser.parse_args()
    folder = arguments.folder
    source = Digits("train", SAMPLES, 0)
    build(source, folder / "train", arguments={"num_samples": SAMPLES})
    texts = [
        part["text"]
        for sample in source.rows(0, 500)
        for message in sample.messages
        for part in message["content"]
        if part["type"] == "text"
    ]
    torch.manual_seed(0)
    for side, make in (("teacher", build_teacher), ("student", build_student)):
        width, layers = getattr(arguments, side)
        make(texts, folder / side, width=width, layers=layers)
    recipe = {
        "run_dir": str(folder / "run"),
        "precision": "bf16",
        "teacher": {"path": str(folder / "teacher"), "max_length": 128},
        "student": {"path": str(folder / "student"), "max_length": 128},
        "data": {"train": str(folder / "train"), "num_workers": 4},
        "batch": {"global_batch": arguments.global_batch, "micro_batch": arguments.micro_batch},
        "stages": [{"kind": "align", "steps": 5}, {"kind": "distill", "steps": 30}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = folder / "run"
    print(f"torchrun --nproc_per_node 1 launch/train.py {path}")
    print(f"python -m benchmarks.teacher {path} {run} --ranks 1 --steps 30 --out FILE")
    print(f"python -m genrecal_ds.planner.measured {run}/distill --peak 989")
    return 0


if __name__ == "__main__":
    sys.exit(main())
