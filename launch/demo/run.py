"""Runs the demo: a whole distillation at toy size, on two CPU ranks or a GPU.

    python -m launch.demo.run [--cache]

--cache: stage 1 keeps the teacher's rows on disk, and stage 2 reads these rows instead of running
the teacher. Some steps of stage 2 are then run again with a live teacher, to compare their seconds.

shards -> two random models -> pretrain both -> gate -> align, distill, sft -> the controls
-> evaluation on held-out handwriting -> probes -> report. A finished step is skipped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.hostfile import free_port
from genrecal_ds.training.search_path import refuse_closed_folders

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "demo"
FOLDER = Path("runs/demo")  # the recipes name it too
RANKS = 2

# name: (split, samples, seed, kinds); the student's share is a small part of the teacher's data
SHARDS: dict[str, tuple[str, int, int, str | None]] = {
    "sight": ("train", 6000, 1, "digit"),
    "train": ("train", 16000, 2, None),
    "share": ("train", 3000, 3, None),
    "validation": ("validation", 400, 4, None),
    "heldout": ("heldout", 600, 5, None),
}
LIVE_STEPS = 60
MIN_LEAD = 0.15  # of the teacher over the baseline, on validation
# name in the report -> the model's folder in the run
STUDENTS = {
    "baseline": "baseline/learn/student",
    "sft_only": "sft_only/second/student",
    "sft_weighted": "sft_weighted/second/student",
    "stage1": "genrecal/align/student",
    "stage2": "genrecal/distill/student",
    "stage3": "genrecal/sft/student",
}
TEACHER = "teacher/learn/student"
# Shown in the report where the grids were run; see launch/grids.
GRIDS = (Path("runs/ablation"), Path("runs/ablation_twin"))


@dataclass
class Demo:
    """The demo's steps, each skipped when its result is there."""

    folder: Path
    is_cached: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seconds_file = self.folder / "seconds.json"
        if self._seconds_file.is_file():
            self.seconds = json.loads(self._seconds_file.read_text())

    def step(self, name: str, result: Path, run: Callable[[], Any]) -> None:
        """Run a step once; its seconds are kept for later reports."""
        if result.exists():
            print(f"== {name}: done before ({self.seconds.get(name, 0):.0f} s)", flush=True)
            return
        print(f"== {name}", flush=True)
        start = time.time()
        run()
        self.seconds[name] = round(time.time() - start, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._seconds_file.write_text(json.dumps(self.seconds, indent=2) + "\n")
        print(f"== {name}: {self.seconds[name]:.0f} s", flush=True)

    def build_shards(self) -> None:
        for name, (split, samples, seed, kinds) in SHARDS.items():
            command = [
                "-m", "data_tools.build", "digits", "--format", "digits", "--split", split,
                "--num-samples", str(samples), "--seed", str(seed),
                "--out", str(self.folder / "data" / name),
            ]  # fmt: skip
            self._python(command + (["--kinds", kinds] if kinds else []))

    def build_pair(self) -> None:
        """Make both models; their tokenizers see the texts of the student's share only."""
        from genrecal_ds.data.index import ShardIndex
        from genrecal_ds.data.reader import ShardReader
        from launch.demo.pair import build_pair

        reader = ShardReader(ShardIndex.load(self.folder / "data" / "share"))
        texts = [
            part["text"]
            for i in range(len(reader))
            for message in reader.read(i).messages
            for part in message["content"]
            if part["type"] == "text"
        ]
        # Complete or invisible: half a model folder would count as built in the next run.
        temporary = self.folder / "models.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        build_pair(texts, temporary)
        shutil.rmtree(self.folder / "models", ignore_errors=True)  # an older one had fewer sizes
        os.replace(temporary, self.folder / "models")

    def train(self, recipe: str) -> None:
        """Launch one recipe; its stages run in order."""
        command = [*self._deepspeed(), "launch/train.py", str(RECIPES / f"{recipe}.yaml")]
        if self.is_cached and recipe == "genrecal":
            command.append(f"teacher.cache={self.folder / 'teacher_rows'}")
        _check(command)

    def train_live(self) -> None:
        """Run stage 2's first steps with a live teacher, from the same start."""
        align = self.folder / "genrecal/align"
        _check([
            *self._deepspeed(), "launch/train.py", str(RECIPES / "genrecal.yaml"),
            "--stage", "distill", f"run_dir={self.folder / 'live'}",
            f"stages.distill.steps={LIVE_STEPS}", f"stages.distill.student={align / 'student'}",
            f"stages.distill.recalibrator={align / 'recalibrator'}", "log.validate_every=0",
        ])  # fmt: skip

    def compare_seconds(self) -> None:
        cached, live = self.folder / "genrecal/distill", self.folder / "live/distill"
        self._python(["-m", "genrecal_ds.planner.measured", str(cached), str(live)])

    def _deepspeed(self) -> list[str]:
        ranks, port = str(_num_ranks()), str(free_port())
        command = str(Path(sys.executable).parent / "deepspeed")
        return [command, "--num_accelerators", ranks, "--master_port", port]

    def evaluate(self, name: str, model: str, shards: str) -> dict[str, Any]:
        """Score a model's folder by kind, or read its result file where that exists."""
        out = self.folder / "scores" / f"{name}.{shards}.json"

        def run() -> None:
            model_folder, data = self.folder / model, self.folder / "data" / shards
            self._python(
                ["-m", "genrecal_ds.evaluate", str(model_folder), str(data), "--out", str(out)]
            )

        self.step(f"evaluate {name} on {shards}", out, run)
        return json.loads(out.read_text())["scores"]

    def probe(self) -> None:
        """Run the probes of both stages that have a Recalibrator."""
        self._python([
            "-m", "genrecal_ds.analysis.probes", str(self.folder / TEACHER),
            str(self.folder / "genrecal/align"), str(self.folder / "genrecal/distill"),
            str(self.folder / "data/heldout"),
            "--out", str(self.folder / "probes.json"),
        ])  # fmt: skip

    def draw(self) -> None:
        """Draw the paper's figures, calibration, and which model errs where."""
        scores, folder = self.folder / "scores", str(self.folder)
        command = ["-m", "genrecal_ds.analysis", f"{folder}/genrecal", f"{folder}/data/heldout"]
        for name, model in {"teacher": TEACHER, **STUDENTS}.items():
            answers = scores / f"{name}.heldout.predictions.jsonl"
            command += ["--predictions", f"{name}={self.folder / model}={answers}"]
        self._python([*command, "--out", str(self.folder / "figures")])

    def _python(self, arguments: list[str]) -> None:
        _check([sys.executable, *arguments])


def require_lead(teacher: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Raises UserError unless the teacher leads clearly, with disjoint intervals."""
    ours, theirs = teacher["overall"], baseline["overall"]
    if ours["score"] - theirs["score"] < MIN_LEAD or ours["low"] <= theirs["high"]:
        raise UserError(
            f"the teacher ({ours['score']:.3f} [{ours['low']:.3f}, {ours['high']:.3f}]) does not "
            f"lead the baseline ({theirs['score']:.3f} [{theirs['low']:.3f}, "
            f"{theirs['high']:.3f}]) by {MIN_LEAD:.2f} with disjoint intervals: nothing to distil"
        )


def require_facts(values: dict[str, Any]) -> None:
    """Raises UserError when a stage's probes say that the method does not work."""
    from genrecal_ds.analysis.probes import facts

    verdicts = facts(values)
    for fact, holds in verdicts.items():
        print(f"{'holds' if holds else 'FAILS'}: {fact}")
    if failed := [fact for fact, holds in verdicts.items() if not holds]:
        raise UserError(f"it does not hold that {failed[0]}; see probes.json")


def run(folder: Path, is_cached: bool = False) -> None:
    if not _has_cuda():  # the deepspeed command would end with a traceback
        refuse_closed_folders(os.environ.get("PATH", os.defpath))
    demo = Demo(folder, is_cached)
    demo.step("shards", folder / "data/heldout/manifest.json", demo.build_shards)
    demo.step("models", folder / "models/large_init/config.json", demo.build_pair)
    for recipe, last in (("teacher", "learn"), ("baseline", "learn")):
        done = folder / recipe / last / "DONE"
        demo.step(f"train {recipe}", done, lambda recipe=recipe: demo.train(recipe))
    require_lead(
        demo.evaluate("teacher", TEACHER, "validation"),
        demo.evaluate("baseline", STUDENTS["baseline"], "validation"),
    )
    for recipe, last in (("genrecal", "sft"), ("sft_only", "second"), ("sft_weighted", "second")):
        done = folder / recipe / last / "DONE"
        demo.step(f"train {recipe}", done, lambda recipe=recipe: demo.train(recipe))
    if is_cached:
        demo.step("stage 2 live", folder / "live/distill/DONE", demo.train_live)
        demo.compare_seconds()
    teacher = demo.evaluate("teacher", TEACHER, "heldout")
    students = {name: demo.evaluate(name, model, "heldout") for name, model in STUDENTS.items()}
    demo.step("probes", folder / "probes.json", demo.probe)

    demo.step("figures", folder / "figures/analysis.html", demo.draw)

    from genrecal_ds.analysis.report import print_table, write_report

    tables = [grid / "tables.json" for grid in GRIDS]
    report = write_report(folder, teacher, students, demo.seconds, tables)
    print_table(report)
    print(f"\n{folder / 'report.html'}  {folder / 'report.json'}")
    require_facts(report["probes"]["distill"])  # last: a failed run needs its report most


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _num_ranks() -> int:
    import torch

    return min(RANKS, torch.cuda.device_count()) if _has_cuda() else RANKS


def _check(command: list[str]) -> None:
    """Run one of our commands; it prints its own error, so this one adds a single line."""
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",  # two ranks on two cores: more threads only wait for each other
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        **({} if _has_cuda() else {"DS_ACCELERATOR": "cpu"}),  # else it warns that it guesses
    }
    if subprocess.run(command, env=environment).returncode != 0:
        raise UserError(f"{' '.join(command[:4])} ... failed; its message is above")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.demo.run", description=__doc__)
    parser.add_argument("--cache", action="store_true")
    arguments = parser.parse_args(argv)
    run(FOLDER, arguments.cache)
    return 0


if __name__ == "__main__":
    sys.exit(main())
