"""Run on every rank: a small engine, its checkpoints, and every way to spoil them.

    ranks_checkpoints.py damage FOLDER OUT     each file cut, flipped, removed; pointers; strangers
    ranks_checkpoints.py full FOLDER OUT       FOLDER lies on a disk with too little room
    ranks_checkpoints.py read_only FOLDER OUT

OUT: the main rank's findings as json. Every rank must come to the same ones.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from genrecal_ds import dist
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.config import CheckpointConfig, OptimizerConfig
from genrecal_ds.recipe.recipe_file import load_ds_config
from genrecal_ds.training import engine
from genrecal_ds.training.checkpoint import Checkpoints

FACTS = {"stage_hash": "x"}


def new_engine() -> engine.StudentEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    module[0].weight.requires_grad_(False)
    config = load_ds_config("student_zero3")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return engine.StudentEngine(module, config, "fp32", OptimizerConfig(), 1)


def train(student: engine.StudentEngine, seed: int) -> None:
    torch.manual_seed(seed + dist.rank())
    student.backward(student(torch.randn(4, 64)).square().mean())
    student.step()


def outcome(call: Callable[[], object]) -> str:
    """What a call did, the same on every rank."""
    try:
        result = call()
        said = result.name if isinstance(result, Path) else str(result)
    except UserError as error:
        said = f"error: {error}"
    everyone = dist.gather_objects(said)
    assert len(set(everyone)) == 1, everyone
    return said


def on_main(call: Callable[[], object]) -> None:
    dist.barrier()
    if dist.is_main():
        call()
    dist.barrier()


def damage(folder: Path) -> dict[str, str]:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    student = new_engine()
    found = {"nothing yet": outcome(lambda: checkpoints.find("auto"))}
    for step in (1, 2, 3):
        train(student, step)
        checkpoints.save(student, step, FACTS)
    found["kept"] = json.dumps(sorted(path.name for path in folder.glob("step-*")))
    found["whole"] = outcome(lambda: checkpoints.find("auto"))
    found["tag"] = outcome(lambda: checkpoints.find("step-00000002"))
    newest = folder / "step-00000003"
    names = sorted(path.name for path in newest.iterdir())
    for name in names:
        path = newest / name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        for kind, spoil in (
            ("truncated", lambda path=path, data=data: path.write_bytes(data[: len(data) // 2])),
            ("flipped", lambda path=path, data=bytes(flipped): path.write_bytes(data)),
            ("removed", path.unlink),
        ):
            on_main(spoil)
            found[f"{kind} {name}: auto"] = outcome(lambda: checkpoints.find("auto"))
            found[f"{kind} {name}: latest"] = outcome(lambda: checkpoints.find("latest"))
            on_main(lambda path=path, data=data: path.write_bytes(data))
    found["files"] = json.dumps(names)

    pointer = folder / "latest"
    for kind, text in (("empty", ""), ("naming nothing", "step-00000009"), ("hostile", "../../x")):
        on_main(lambda text=text: pointer.write_text(text))
        found[f"pointer {kind}: auto"] = outcome(lambda: checkpoints.find("auto"))
        found[f"pointer {kind}: latest"] = outcome(lambda: checkpoints.find("latest"))
    on_main(pointer.unlink)
    found["pointer removed: auto"] = outcome(lambda: checkpoints.find("auto"))
    found["pointer removed: latest"] = outcome(lambda: checkpoints.find("latest"))

    on_main(lambda: newest.chmod(0o777))
    found["writable by anyone"] = outcome(lambda: checkpoints.find("auto"))
    trusting = Checkpoints(folder, CheckpointConfig(trust=True))
    found["writable by anyone, trusted"] = outcome(lambda: trusting.find("auto"))
    on_main(lambda: newest.chmod(0o755))

    on_main(lambda: (folder / "step-00000004.tmp").mkdir())
    found["half written"] = outcome(lambda: checkpoints.find("auto"))
    train(student, 4)
    checkpoints.save(student, 4, FACTS)
    found["after it"] = json.dumps(sorted(path.name for path in folder.glob("step-*")))
    checkpoints.set_aside(newer_than=folder / "step-00000003")
    found["set aside"] = json.dumps(sorted(path.name for path in folder.glob("*step-*")))
    on_main(lambda: (folder / "abandoned-step-00000004").rename(folder / "step-00000004"))
    student.close()  # DeepSpeed loads into a pristine engine only
    student = new_engine()
    loaded = outcome(lambda: checkpoints.load(student, folder / "step-00000004", FACTS)["step"])
    found["loaded"] = loaded
    on_main(lambda: [shutil.rmtree(path) for path in folder.glob("step-*")])
    found["all gone"] = outcome(lambda: checkpoints.find("auto"))
    checkpoints.set_aside(newer_than=None)  # as resume=never does
    found["begun anew"] = outcome(lambda: checkpoints.find("auto"))
    return found


def no_room(folder: Path) -> dict[str, str]:
    """The first save fits, the second does not; the third, when there is room again, does."""
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    student = new_engine()
    ballast = folder / "ballast"
    found = {}
    train(student, 1)
    found["first"] = outcome(lambda: checkpoints.save(student, 1, FACTS))
    on_main(lambda: fill(ballast))
    train(student, 2)
    found["second"] = outcome(lambda: checkpoints.save(student, 2, FACTS))
    found["left"] = json.dumps(
        sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    )
    found["auto"] = outcome(lambda: checkpoints.find("auto"))
    on_main(ballast.unlink)
    found["third"] = outcome(lambda: checkpoints.save(student, 2, FACTS))
    found["then"] = outcome(lambda: checkpoints.find("auto"))
    return found


def fill(path: Path) -> None:
    """Leave some tens of kilobytes free: enough for a folder, too little for a checkpoint."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 14))
        except OSError:
            file.truncate(file.tell() - (1 << 16))


def read_only(folder: Path) -> dict[str, str]:
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    student = new_engine()
    train(student, 1)
    return {"save": outcome(lambda: checkpoints.save(student, 1, FACTS))}


def main(scenario: str, folder: str, out: str) -> None:
    engine.start()
    found = {"damage": damage, "full": no_room, "read_only": read_only}[scenario](Path(folder))
    if dist.is_main():
        Path(out).write_text(json.dumps(found, indent=1))
    dist.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
