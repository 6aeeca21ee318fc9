"""Records one start of a run: its folder of logs and facts, and how it ended.

RUN/logs/attempt-001/    attempt.json (when, git hash, where, how far the run was), recipe.yaml as
                         resolved, one log per host or job step

python -m launch.attempt begin RECIPE [key=value ...]   makes the folder, prints its path
python -m launch.attempt end   RECIPE [key=value ...]   prints done, stopped, failed or stuck
python -m launch.attempt stages RECIPE [key=value ...]  prints the stages' names, in order
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from genrecal_ds.console.command import command
from genrecal_ds.console.redact import redact_tree
from genrecal_ds.recipe.config import Recipe
from genrecal_ds.recipe.recipe_file import check_folders, load_recipe
from genrecal_ds.training.guards.stopping import STOP_FILE
from launch.recipes import find_recipe

ROOT = Path(__file__).resolve().parent.parent
MAX_WITHOUT_PROGRESS = 3


def begin(recipe: Recipe, **facts: Any) -> Path:
    """Make the next attempt's folder. facts: what the launcher adds, JSON."""
    (recipe.run_dir / STOP_FILE).unlink(missing_ok=True)  # meant for an attempt that was killed
    logs = recipe.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    folder = logs / f"attempt-{len(list(logs.glob('attempt-*'))) + 1:03d}"
    folder.mkdir()
    tree = redact_tree(recipe.model_dump(mode="json"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    known = {
        "time": time.time(),
        "git": git_hash(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
        "progress": progress(recipe),
    }
    (folder / "attempt.json").write_text(json.dumps(redact_tree({**known, **facts}), indent=2))
    return folder


def git_hash() -> str | None:
    """Ask git for the running code's commit; + if files differ, None without a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def progress(recipe: Recipe) -> dict[str, int]:
    """Read the steps trained so far, by stage, from the last whole line of each ledger."""
    steps = {}
    for stage in recipe.stages:
        path = recipe.run_dir / stage.name / "ledger.jsonl"
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.is_file() else []
        steps[stage.name] = json.loads(lines[-1])["step"] if lines else 0
    return steps


def outcome(recipe: Recipe, stage: str | None = None) -> str:
    """Say how the run stands by its marker files: done, stopped (can go on) or failed."""
    folder = recipe.run_dir / stage if stage else recipe.run_dir
    if (folder / "DONE").is_file():
        return "done"
    return "stopped" if (recipe.run_dir / "STOPPED").is_file() else "failed"


def is_stuck(recipe: Recipe) -> bool:
    """True if the last attempts all began where the run still is: the next would fail too."""
    attempts = sorted((recipe.run_dir / "logs").glob("attempt-*/attempt.json"))
    if len(attempts) < MAX_WITHOUT_PROGRESS:
        return False
    now = progress(recipe)
    return all(
        json.loads(path.read_text())["progress"] == now for path in attempts[-MAX_WITHOUT_PROGRESS:]
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.attempt", description=__doc__)
    parser.add_argument("command", choices=("begin", "end", "stages"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage")
    parser.add_argument("--trust-checkpoint", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)
    if arguments.command == "begin":
        check_folders(recipe)
        print(begin(recipe))
        return 0
    if arguments.command == "stages":
        print(*(stage.name for stage in recipe.stages))
        return 0
    ending = outcome(recipe, arguments.stage)
    print("stuck" if ending != "done" and is_stuck(recipe) else ending)
    return 0


if __name__ == "__main__":
    sys.exit(main())
