"""Whether faithful.yaml and recommended.yaml train bit for bit what they did at another commit.

python -m tests.same_bits COMMIT [--steps 8] [--ranks 2] [--folder DIR]

Each recipe as it is here, with few steps of small batches, fp32 and probes in every step, on the
tests' tiny pair: once by the files here, committed or not, once by those of COMMIT, each with its
own ds_configs, on the same models, shards and packages. Compared are the bytes of every weight file
that a stage leaves, and every number of metrics.jsonl that is no time, rate or memory; numbers that
are new here are no difference. Exits with 1 where one differs. Needs git. bf16 and GPUs are not
looked at.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import yaml

from genrecal_ds.recipe.hostfile import free_port
from tests.fixtures import (
    ROOT,
    build_digit_shards,
    environment,
    partitioning_ds_configs,
    records,
    texts_of_digits,
)

# The paper, through the Recalibrator; and the next-byte KL at the student's own head.
RECIPES = ("faithful", "recommended")
MEASURED = ("seconds", "phases", "tokens_per_second", "peak_memory_gib")  # never twice the same


def build_inputs(folder: Path) -> None:
    from launch.demo.pair import build_pair

    build_pair(texts_of_digits(), folder)
    for split, count in (("train", 200), ("validation", 24)):
        build_digit_shards(folder / split, split, count, seed=2)


def recipe_of(name: str, folder: Path, side: str, project: Path, steps: int, ranks: int) -> Path:
    """The recipe as published, at the size of the tiny pair; a cache and ds_configs of its side."""
    tree = yaml.safe_load((ROOT / f"launch/recipes/{name}.yaml").read_text())
    tree |= {
        "precision": "fp32", "deterministic": True,
        "teacher": {
            "path": str(folder / "teacher_init"), "cache": str(folder / side / f"rows_{name}"),
        },
        "student": {"path": str(folder / "student_init")},
        "data": {split: str(folder / split) for split in ("train", "validation")},
        "batch": {"global_batch": 4 * ranks, "micro_batch": 2},
        "log": {"probes_every": 1, "validation_samples": 8},
        "deepspeed": partitioning_ds_configs(folder / side, project),
    }  # fmt: skip
    tree["teacher"]["max_length"] = tree["student"]["max_length"] = 128
    for stage in tree["stages"]:
        del stage["epochs"]
        stage["steps"] = steps
        if "global_batch" in stage:  # twice the recipe's in both, as published
            stage |= {"global_batch": 8 * ranks, "micro_batch": 4}
    path = folder / side / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def files_of(commit: str, out: Path) -> Path:
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(f"error: git archive {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(out, filter="data")
    return out


def train(tree: Path, recipe: Path, run: Path, ranks: int) -> None:
    """On processes that know nothing of this one: the packages are shared, the project is not."""
    shared = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tree), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "launch/train.py", str(recipe), f"run_dir={run}"]
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(
                command, cwd=tree, stdout=output, stderr=output,
                env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            )
            for rank in range(ranks)
        ]  # fmt: skip
        if any([process.wait() for process in processes]):
            output.seek(0)
            sys.exit(f"error: {tree}: training failed\n{output.read()[-3000:]}")


def weights(run: Path) -> dict[str, str]:
    """sha256 by file. Checkpoints hold more than weights, and are not results."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*.safetensors"))
    }


def numbers(run: Path) -> dict[str, Any]:
    """All that metrics.jsonl says of a stage, flat, without what is measured."""
    found = {}
    for log in sorted(run.glob("*/metrics.jsonl")):
        for line in records(log.parent):
            kept = {name: value for name, value in line.items() if name not in MEASURED}
            for name, value in _flat(kept):
                found[f"{log.parent.name} step {line['step']} {name}"] = value
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in tree.items():
        own = f"{prefix}{name}"
        flat += _flat(value, f"{own}.") if isinstance(value, dict) else [(own, value)]
    return flat


def compared(what: str, here: dict[str, Any], there: dict[str, Any]) -> bool:
    """Whether what is there is here, and equal."""
    shared = here.keys() & there.keys()
    different = sorted(name for name in shared if here[name] != there[name])
    print(f"{what}: {len(shared) - len(different)} of {len(shared)} equal")
    for name in different[:10]:
        print(f"  {name}: {here[name]} here, {there[name]} there")
    for side, own, other in (("here", here, there), ("there", there, here)):
        if alone := sorted(own.keys() - other.keys()):
            print(f"  {len(alone)} only {side}, as {alone[0]}")
    return bool(shared) and not different and there.keys() <= here.keys()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.same_bits", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("commit")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="default: a temporary one, removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        if folder.exists() and any(folder.iterdir()):  # finished stages would be skipped
            sys.exit(f"error: --folder {folder}: is not empty; name a new one")
        folder.mkdir(parents=True, exist_ok=True)
        tree = files_of(arguments.commit, folder / "tree")
        build_inputs(folder)
        same = True
        for name in RECIPES:
            for side, project in (("here", ROOT), ("there", tree)):
                print(f"training {name} {side}", flush=True)
                recipe = recipe_of(name, folder, side, project, arguments.steps, arguments.ranks)
                train(project, recipe, folder / side / name, arguments.ranks)
            here, there = folder / "here" / name, folder / "there" / name
            same &= compared(f"{name}: weight files", weights(here), weights(there))
            same &= compared(f"{name}: numbers of metrics.jsonl", numbers(here), numbers(there))
    print("bit for bit the same" if same else "NOT the same")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
