"""Starts a run over several hosts; keeps its logs and says how it ended.

python -m launch RECIPE.yaml --hostfile HOSTS [key=value ...]

Ends with 0 when the run is done, 75 when it was stopped and can go on, else with the code of the
host that failed first. RUN/DONE and RUN/STOPPED say the same.
"""

import argparse
import sys
from pathlib import Path

from genrecal_ds.console.redact import redact_output
from genrecal_ds.errors import UserError
from genrecal_ds.recipe.hostfile import read_hostfile
from genrecal_ds.recipe.recipe_file import check_folders, load_recipe
from launch.attempt import begin, outcome
from launch.hosts import LOCAL_HOSTS, run_over
from launch.train import find_recipe

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", help="a YAML file, or the name of one in launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hostfile", type=Path, required=True, help="lines: HOST slots=RANKS")
    parser.add_argument("--master_addr", help="of the first host, as others reach it")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--stage", help="train this one only")
    parser.add_argument("--trust-checkpoint", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    redact_output()
    try:
        return start(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def start(arguments: argparse.Namespace) -> int:
    """As the module's docstring says. Raises UserError before anything is started."""
    hosts = read_hostfile(arguments.hostfile)
    recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)
    check_folders(recipe)
    for stage in recipe.stages:
        recipe.accumulation_steps(stage, sum(hosts.values()))
    first = next(iter(hosts))
    address = arguments.master_addr or ("127.0.0.1" if first in LOCAL_HOSTS else first)
    logs = begin(recipe, hosts=hosts, arguments=[arguments.recipe, *arguments.overrides])
    passed = [arguments.recipe, *arguments.overrides]
    if arguments.stage:
        passed += ["--stage", arguments.stage]
    if arguments.trust_checkpoint:
        passed.append("--trust-checkpoint")
    code = run_over(hosts, passed, f"{address}:{arguments.master_port}", logs)
    found = outcome(recipe, arguments.stage)
    if code:
        print(f"failed with code {code}; logs: {logs}", file=sys.stderr, flush=True)
    elif found == "failed":  # a launcher that reports success when its child died
        code = 1
        print(f"ranks ended without a word; logs: {logs}", file=sys.stderr, flush=True)
    else:
        print(f"{found}: {recipe.run_dir}; logs: {logs}", flush=True)
        code = EXIT_STOPPED if found == "stopped" else 0
    return code


if __name__ == "__main__":
    sys.exit(main())
