"""Writes the student as a plain Hugging Face folder; the Recalibrator is left out.

python -m genrecal_ds.export runs/demo/sft OUT                       a finished stage
python -m genrecal_ds.export runs/demo/sft/checkpoints/step-00000100 OUT   one in the middle
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError
from genrecal_ds.models.lora import merged
from genrecal_ds.models.saving import write_student
from genrecal_ds.models.vlm import plain_model

_PREFIX = "student.model."


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write a checkpoint from the middle of a stage as a Hugging Face folder.

    Frozen parameters come from the folder that the stage started from, the others from the shards.
    """
    from genrecal_ds.training.checkpoint import consolidate, verify
    from genrecal_ds.training.manifest import read_manifest

    if defect := verify(path):
        raise UserError(f"{path}: {defect}; export another checkpoint")
    manifest = read_manifest(path)
    source = Path(manifest["student"])
    model = plain_model(source)
    state = model.state_dict()
    for name, value in consolidate(path).items():
        if name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
            if name in state:
                state[name].copy_(value)  # in place: a tied head follows its embedding
            else:
                state[name] = value.to(model.dtype)
    if manifest.get("adapter_scale"):
        state = merged(state, manifest["adapter_scale"])
    write_student(model, state, source, folder)


def export(source: Path, folder: Path) -> None:
    """Export a finished stage's folder or a checkpoint. Raises UserError for anything else."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    if (source / "student" / "config.json").is_file():
        shutil.copytree(source / "student", folder)
    elif (source / "manifest.json").is_file():
        export_checkpoint(source, folder)
    else:
        raise UserError(f"{source}: neither a finished stage (student/) nor a complete checkpoint")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.export", __doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    export(arguments.source, arguments.out)
    print(f"wrote {arguments.out} (torch {torch.__version__})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
