"""Checkpoints that are complete or invisible, and verified before they are loaded.

checkpoints/step-00000120.tmp/   being written; ignored, removed by the next save
checkpoints/step-00000120/       complete: manifest.json with sha256 of every file
checkpoints/latest               the newest complete one, replaced atomically
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genrecal_ds import dist
from genrecal_ds.data.index import file_sha256
from genrecal_ds.errors import UserError
from genrecal_ds.training.engine import StudentEngine

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage."""

    folder: Path
    keep: int

    def save(self, engine: StudentEngine, step: int, facts: dict[str, Any]) -> None:
        """Write step's checkpoint; every rank calls it. facts: JSON, checked at resume."""
        name = f"step-{step:08d}"
        temporary = self.folder / f"{name}.tmp"
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        engine.save(self.folder, temporary.name, {"rng": _rng_state()})
        dist.barrier()  # every rank's shards are on disk before anyone can see the checkpoint
        if dist.is_main():
            _write_manifest(temporary, {**facts, "step": step, "world_size": dist.world_size()})
            final = self.folder / name
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _write_atomically(self.folder / "latest", name)
            self._remove_old()
        dist.barrier()

    def latest(self) -> Path | None:
        """The newest complete checkpoint. Raises UserError if the pointer names none."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text().strip()
        if not (path / MANIFEST).is_file():
            raise UserError(f"{pointer}: names {path.name}, which is not a complete checkpoint")
        return path

    def load(
        self,
        engine: StudentEngine,
        path: Path,
        facts: dict[str, Any],
        may_differ: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Restore a checkpoint of the same run and world size; returns its manifest.

        Raises UserError naming what differs: never a silent start from step 0.
        """
        manifest = verify(path)
        expected = {**facts, "world_size": dist.world_size()}
        expected.pop("student", None)  # a path, for export; the run's folder may have been moved
        for key, value in expected.items():
            if manifest.get(key) != value and key not in may_differ:
                data = key in ("data", "plan")
                raise UserError(
                    f"{path}: was written with {key} {manifest.get(key)!r}, this run has "
                    f"{value!r}; resume with the same, or set resume=never and another run_dir"
                    + (", or resume=new_data to begin an epoch of the new order" if data else "")
                )
        state = engine.load(self.folder, path.name)
        _set_rng_state(state["rng"])
        return manifest

    def _remove_old(self) -> None:
        complete = sorted(path.parent for path in self.folder.glob(f"step-*/{MANIFEST}"))
        for path in complete[: -self.keep]:
            shutil.rmtree(path)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their recorded sha256.

    The main rank reads; the verdict is shared, so that all ranks raise the same UserError.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    damaged: list[str] = []
    if dist.is_main():
        for name, digest in manifest["files"].items():
            file = path / name
            if not file.is_file() or file_sha256(file) != digest:
                damaged.append(name)
    count = dist.sum_over_ranks(torch.tensor(len(damaged), device=dist.device()))
    if count:
        shown = damaged[0] if damaged else "a file"
        raise UserError(f"{path}: {shown} is missing or damaged; resume from an older checkpoint")
    return manifest


def consolidate(path: Path) -> dict[str, Tensor]:
    """Whole fp32 trainable parameters of a checkpoint, by name in the trained module."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(
        str(path.parent), path.name, exclude_frozen_parameters=True
    )


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    _write_atomically(folder / MANIFEST, json.dumps({**facts, "files": hashes}, indent=2))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
