"""Stage 2 with the teacher in every place, and with several micro-batches in one forward of it.

    python -m benchmarks.teacher RECIPE RUN [--steps 60] [--ranks 2] [--out FILE] [key=value ...]

RUN: a run_dir of the recipe in which align is finished. Runs distill once per variant, in turn,
twice over; prints and writes the median seconds of a step and of its phases, warm-up steps left
out, and FLOP/s of the teacher's phase and of the rest. The cached variant is timed from when its
rows are there.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from genrecal_ds.planner import measured

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "zero3": [],
    "zero3, 2 at once": ["teacher.forward_batches=2"],
    "zero3, 4 at once": ["teacher.forward_batches=4"],
    "zero3_host": ["teacher.placement=zero3_host"],
    "zero3_offload": ["teacher.placement=zero3_offload"],
    "replica": ["teacher.placement=replica"],
    "cache": ["teacher.cache=CACHE"],
}
WARM_UP, ROUNDS = 5, 2
PHASES = ("teacher", "student", "recalibrator", "head", "backward", "optimizer", "data")


def run(recipe: str, ranks: int, overrides: list[str], run_dir: Path) -> tuple[float, list[dict]]:
    """(seconds of the whole launch, the stage's logged steps)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [f"--master_port={port}", "launch/train.py", recipe, f"run_dir={run_dir}"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, *overrides, "--stage", "distill"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    lines = (run_dir / "distill/metrics.jsonl").read_text().splitlines()
    return time.perf_counter() - start, [json.loads(line) for line in lines]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    align = arguments.run / "align"
    shared = [
        *arguments.overrides, f"stages.distill.steps={arguments.steps}",
        f"stages.distill.student={align / 'student'}",
        f"stages.distill.recalibrator={align / 'recalibrator'}",
        "log.every=1", "log.probes_every=0",
        "log.validate_every=0", "log.validation_samples=1",
    ]  # fmt: skip
    steps: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    counted: dict[str, measured.Measured] = {}
    for number in range(ROUNDS):
        for name, own in VARIANTS.items():
            own = [word.replace("CACHE", str(folder / "cache")) for word in own]
            run_dir = folder / f"{name.replace(' ', '_')}-{number}"
            whole, lines = run(arguments.recipe, arguments.ranks, [*shared, *own], run_dir)
            seconds[name].append(whole)
            steps[name] += lines[WARM_UP:-1]  # the last one holds the validation
            counted[name] = measured.read(run_dir / "distill")
    found = {}
    for name, lines in steps.items():
        of_step = [line["seconds"] for line in lines]
        found[name] = {"step_ms": 1e3 * statistics.median(of_step)}
        for phase in PHASES:
            values = [line["phases"].get(phase, 0.0) for line in lines]
            found[name][f"{phase}_ms"] = 1e3 * statistics.median(values)
        found[name]["samples_per_second"] = lines[0]["tokens"]["samples"] / statistics.median(
            of_step
        )
        work = counted[name].flops
        found[name]["gflop_of_a_sample"] = sum(work.values()) / counted[name].samples / 1e9
        rest = (found[name]["step_ms"] - found[name]["teacher_ms"]) / 1e3
        found[name]["gflops_but_teacher"] = (sum(work.values()) - work["teacher"]) / rest / 1e9
        if work["teacher"]:
            found[name]["gflops_teacher"] = work["teacher"] / found[name]["teacher_ms"] / 1e6
        found[name]["launches_s"] = [round(value, 1) for value in seconds[name]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    base, work = found["zero3"]["samples_per_second"], found["zero3"]["gflop_of_a_sample"]
    for name, values in found.items():
        phases = "  ".join(f"{p} {values[f'{p}_ms']:.1f}" for p in PHASES)
        print(f"{name:<18} {values['step_ms']:7.1f} ms  x{values['samples_per_second'] / base:.2f}"
              f" (by FLOPs alone x{work / values['gflop_of_a_sample']:.2f})"
              f"  {phases}")  # fmt: skip
    if arguments.out:
        device = f"{os.cpu_count()}-core {platform.machine()} CPU"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        result = {"device": device, "ranks": arguments.ranks, "variants": found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
