"""Trains and scores every arm of a grid under every condition and seed; makes the tables.

    python -m genrecal_ds.ablate RECIPE.yaml --grid GRID.yaml --out runs/ablation --jobs 2
    sbatch --array 0-15 launch/slurm/ablate.sbatch RECIPE.yaml --grid GRID.yaml --out runs/ablation
    python -m genrecal_ds.ablate RECIPE.yaml --grid GRID.yaml --out runs/ablation --table

A run is a folder, OUT/ARM/seed-N, or OUT/CONDITION/ARM/seed-N where the grid has conditions.
When the command is started again, finished runs are kept and interrupted runs go on. The tables,
OUT/tables.md and OUT/tables.json, hold the finished runs and say which are missing. Behind the
tables of scores stand the last probes of arms that have probes. genrecal_ds/ablate/grid.py says
what a grid file holds.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from genrecal_ds.ablate import probes, table
from genrecal_ds.ablate.grid import Grid, Run, claim, load_grid, runs_of
from genrecal_ds.console.arguments import command_parser, positive, share
from genrecal_ds.console.command import command, complain
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.hostfile import free_port


def perform(run: Run, grid: Grid, launcher: Sequence[str], num_threads: int) -> str:
    """Train and score one run; output goes to the run's folder. Returns a line about it.

    Raises UserError where a command failed, naming the log.
    """
    if run.is_done:
        return "done before"
    before = _seconds(run)
    start = time.monotonic()
    _command(run, [*launcher, str(run.recipe), *run.overrides], num_threads)
    (run.folder / "seconds.json").write_text(f"{before + time.monotonic() - start:.1f}\n")
    limit = ["--limit", str(grid.limit)] if grid.limit else []
    evaluate = [sys.executable, "-m", "genrecal_ds.evaluate", str(run.student), str(grid.shards)]
    tokens = ["--max-new-tokens", str(grid.max_new_tokens)]
    _command(run, [*evaluate, "--out", str(run.score), *tokens, *limit], num_threads)
    score = json.loads(run.score.read_text())["scores"]["overall"]
    return f"{score['score']:.3f} in {_seconds(run):.0f} s"


def _seconds(run: Run) -> float:
    """The seconds of training, earlier starts included."""
    path = run.folder / "seconds.json"
    return float(path.read_text()) if path.is_file() else 0.0


def _command(run: Run, command: list[str], num_threads: int) -> None:
    environment = {
        "OMP_NUM_THREADS": str(num_threads), "PYTHONWARNINGS": "ignore",
        **os.environ, "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    log = run.folder / "output.log"
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        raise UserError(f"{run.name}: exit {code}; see {log}")


def write_tables(grid: Grid, runs: Sequence[Run], out: Path) -> str:
    """Write both files; return the Markdown."""
    scores, probed = table.tables_of(grid, runs), probes.probe_tables(grid, runs)
    text = "\n".join(filter(None, (table.markdown(scores), probes.markdown(probed))))
    both = table.as_json(scores) | probes.as_json(probed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text + "\n")
    (out / "tables.json").write_text(json.dumps(both, indent=2) + "\n")
    return text


def perform_all(
    runs: Sequence[Run], grid: Grid, launcher: Sequence[str], jobs: int, num_all: int
) -> list[str]:
    """Perform all runs and return what failed. A failure ends no other run."""
    num_threads = max(1, (os.cpu_count() or 1) // jobs)
    failures: list[str] = []

    def one(run: Run) -> None:
        try:
            print(f"{run.name}: {perform(run, grid, launcher, num_threads)}")
        except UserError as error:
            failures.append(str(error))
            complain(error)
        sys.stdout.flush()

    print(f"{len(runs)} of {num_all} runs, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))
    return failures


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m genrecal_ds.ablate", __doc__)
    parser.add_argument("recipe", type=Path, help="of the arms that name none")
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=positive(int), default=1, help="runs at a time")
    parser.add_argument("--task", type=share, metavar="I/N", help="this share of the runs only")
    parser.add_argument("--table", action="store_true", help="only the tables of what is there")
    parser.add_argument(
        "--launcher", default=f"{shlex.quote(sys.executable)} -m launch.train",
        help="what trains, in front of a recipe: 'deepspeed launch/train.py'; default one process",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    grid = load_grid(arguments.grid)
    runs = runs_of(grid, arguments.recipe, arguments.out)
    failures: list[str] = []
    if not arguments.table:
        number, count = arguments.task or (0, 1)
        own = runs[number::count]
        for run in own:
            claim(run)
        launcher = shlex.split(arguments.launcher)
        failures = perform_all(own, grid, launcher, arguments.jobs, len(runs))
    print(write_tables(grid, runs, arguments.out))
    if failures:
        complain(f"{len(failures)} runs failed; start again to repeat them")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
