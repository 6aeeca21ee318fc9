"""Saves checkpoints that are complete or invisible, and verifies them before loading.

checkpoints/step-00000120.tmp/   being written; ignored, removed by the next save
checkpoints/step-00000120/       complete: manifest.json with size and sha256 of every file
checkpoints/latest               the newest complete one, replaced atomically
checkpoints/saves.jsonl          one line per save: step, seconds, bytes
checkpoints/abandoned-step-...   newer than what a run went on from: damaged, or not wanted

Every rank learns of an error before any rank acts on it: the other ranks would wait otherwise.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from genrecal_ds import dist
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import CheckpointConfig
from genrecal_ds.training.engine import StudentEngine
from genrecal_ds.training.manifest import (
    MANIFEST,
    HashingFile,
    defect,
    read_manifest,
    refuse_foreign,
    sync_folder,
    write_atomically,
    write_manifest,
)

SAVES = "saves.jsonl"
# Of checkpoints that do not state it: the size that DeepSpeed took by itself.
OLD_LAYOUT = {"sub_group_size": 1_000_000_000}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage."""

    folder: Path
    config: CheckpointConfig

    def save(self, engine: StudentEngine, step: int, facts: dict[str, Any]) -> None:
        """Write step's checkpoint; every rank calls this. facts: JSON, checked at resume.

        Raises UserError on every rank when one rank cannot write; older checkpoints stay unchanged.
        """
        start = time.perf_counter()
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        dist.raise_together(self._on_main(self._make_room, temporary))
        files = _Files()
        engine.save(self.folder, temporary.name, files)
        self._raise_if_failed(files.error, temporary)
        written = {}
        for of_rank in dist.gather_objects(files.written):
            written |= of_rank
        facts = {**facts, "step": step, **engine.layout}
        dist.raise_together(self._on_main(self._publish, temporary, final, facts, written, start))

    def find(self, resume: str) -> Path | None:
        """Find the checkpoint to go on from and verify its files; None to start at step 0.

        auto: the newest whole one. latest: what the pointer names, or else an error. step-N: that
        one. Raises UserError when a checkpoint was asked for, or written, and none is whole.
        """
        names, pointed, was_saved = dist.from_main(self._listing() if dist.is_main() else None)
        if resume == "latest" or resume.startswith("step-"):
            name = pointed if resume == "latest" else resume
            if name not in names:
                shown = ", ".join(names) or "none"
                raise UserError(f"{self.folder}: no whole checkpoint {name}; there are: {shown}")
            if problem := verify(self.folder / name, self.config.trust):
                raise UserError(f"{self.folder / name}: {problem}; resume from another")
            return self.folder / name
        for name in reversed(names):
            problem = verify(self.folder / name, self.config.trust)
            if problem is None:
                return self.folder / name
            if dist.is_main():
                print(f"{self.folder / name}: {problem}; left out", file=sys.stderr, flush=True)
        if names or was_saved:
            raise UserError(
                f"{self.folder}: checkpoints were written here and none is whole; restore one, "
                "or set resume=never and another run_dir to begin again"
            )
        return None

    def set_aside(self, newer_than: Path | None) -> None:
        """Rename the checkpoints newer than `newer_than`, from which a run now goes on.

        Otherwise a later start would resume from them, in the middle of another history.
        """

        def rename() -> None:
            if newer_than is None:  # nothing is lost by starting at step 0 again
                (self.folder / SAVES).unlink(missing_ok=True)
            for name in self._listing()[0]:
                if newer_than is None or name > newer_than.name:
                    aside = self.folder / f"abandoned-{name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.folder / name).rename(aside)
                    print(f"{self.folder / name}: set aside as {aside.name}", file=sys.stderr)

        dist.raise_together(self._on_main(rename))

    def load(
        self,
        engine: StudentEngine,
        path: Path,
        facts: dict[str, Any],
        may_differ: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Restore a verified checkpoint of the same run, of any layout; return its manifest.

        Raises UserError naming what differs: a run never starts silently from step 0.
        """
        manifest = read_manifest(path)
        expected = dict(facts)
        expected.pop("student", None)  # a path, for export; the run's folder may have been moved
        for key, value in expected.items():
            if manifest.get(key) != value and key not in may_differ:
                data = key in ("data", "plan")
                raise UserError(
                    f"{path}: was written with {key} {manifest.get(key)!r}, this run has "
                    f"{value!r}; resume with the same, or set resume=never and another run_dir"
                    + (", or resume=new_data to begin an epoch of the new order" if data else "")
                )
        if engine.layout.items() <= (OLD_LAYOUT | manifest).items():
            engine.load(self.folder, path.name)
            return manifest
        universal = self.folder / f"{path.name}.universal.tmp"
        dist.raise_together(self._on_main(_convert, path, universal))
        engine.load(self.folder, universal.name, universal=True)
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(universal)
        return manifest

    def _make_room(self, temporary: Path) -> None:
        for left_over in self.folder.glob("step-*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)

    def _raise_if_failed(self, error: str | None, temporary: Path) -> None:
        messages = [text for text in dist.gather_objects(error) if text]
        if not messages:
            return
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{temporary}: {messages[0]}; mend it and start again: {self._last()}")

    def _publish(
        self,
        temporary: Path,
        final: Path,
        facts: dict[str, Any],
        files: dict[str, dict[str, Any]],
        start: float,
    ) -> None:
        write_manifest(temporary, facts, files)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync_folder(self.folder)
        write_atomically(self.folder / "latest", final.name)
        sync_folder(self.folder)
        size = sum(file["bytes"] for file in files.values())
        line = {"step": facts["step"], "seconds": time.perf_counter() - start, "bytes": size}
        with (self.folder / SAVES).open("a") as saves:
            saves.write(json.dumps({**line, "time": time.time()}) + "\n")
        print(f"{final}: saved, {size / 2**20:.1f} MiB in {line['seconds']:.2f} s", flush=True)
        self._remove_old()

    def _remove_old(self) -> None:
        names, _, _ = self._listing()
        for name in names[: -self.config.keep]:
            every = self.config.keep_every
            if not (every and int(name.removeprefix("step-")) % every == 0):
                shutil.rmtree(self.folder / name)

    def _listing(self) -> tuple[list[str], str, bool]:
        """List complete checkpoints, oldest first; what `latest` names; True if a save is noted."""
        names = sorted(
            path.parent.name
            for path in self.folder.glob(f"step-*/{MANIFEST}")
            if not path.parent.name.endswith(".tmp")
        )
        pointer = self.folder / "latest"
        pointed = pointer.read_text().strip() if pointer.is_file() else ""
        return names, pointed, (self.folder / SAVES).is_file()

    def _last(self) -> str:
        names, _, _ = self._listing()
        return f"the last checkpoint is {names[-1]}" if names else "there is no checkpoint yet"

    def _on_main(self, call: Callable[..., None], *arguments: Any) -> str | None:
        """Run a call on the main rank; return what went wrong as a line for raise_together."""
        if not dist.is_main():
            return None
        try:
            call(*arguments)
        except OSError as error:
            return f"{self.folder}: {error}; mend it and start again: {self._last()}"
        except subprocess.CalledProcessError as error:
            return f"{self.folder}: {error.stderr.strip()[-500:]}"
        return None


class _Files(TorchCheckpointEngine):
    """DeepSpeed's writer of files: to disk, with a digest; an error waits for all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, dict[str, Any]] = {}
        self.error: str | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=True)

    def save(self, state_dict: Any, path: str) -> None:
        if self.error:
            return
        file = None
        try:
            file = HashingFile(Path(path))
            torch.save(state_dict, file)
            self.written[file.path.name] = file.close()
        except (OSError, RuntimeError) as error:
            cause = file.error if file and file.error else error
            if not isinstance(cause, OSError):
                raise  # a defect of ours
            self.error = f"rank {dist.rank()}: {cause.strerror}"


def verify(path: Path, is_trusted: bool = False) -> str | None:
    """Say what is wrong with a checkpoint, or None. A collective: each rank reads a share of files.

    Raises UserError on every rank if others may have written the checkpoint; see refuse_foreign.
    """
    refusal = None
    if dist.is_main() and not is_trusted:
        try:
            refuse_foreign(path)
        except (UserError, OSError) as error:
            refusal = str(error)
    dist.raise_together(refusal)
    try:
        manifest = read_manifest(path)
        names = sorted(manifest["files"])[dist.rank() :: dist.world_size()]
        problem = defect(path, manifest["files"], names)
    except UserError as error:
        problem = str(error)
    return next(filter(None, dist.gather_objects(problem)), None)


def consolidate(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's whole fp32 trainable parameters, by name in the trained module."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(
        str(path.parent), path.name, exclude_frozen_parameters=True
    )


def _convert(path: Path, universal: Path) -> None:
    """Write DeepSpeed's universal form, which any number of ranks can read, by its command."""
    shutil.rmtree(universal, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(path), "--output_folder", str(universal)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=_without_ranks())
    # The command leaves a pointer beside its result; our pointer is `latest`.
    (universal.parent / "latest_universal").unlink(missing_ok=True)


def _without_ranks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
