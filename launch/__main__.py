"""Starts a run over hosts, keeps its logs, and reports how it ended.

python -m launch RECIPE.yaml --hostfile HOSTS [key=value ...]

The exit code is 0 when the run is done, 75 when it was stopped and can go on, else the code of the
host that failed first. RUN/DONE and RUN/STOPPED say the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from genrecal_ds.console.command import command
from genrecal_ds.console.redact import redact_output
from genrecal_ds.recipe.hostfile import read_hostfile
from launch.arguments import recipe_parser
from launch.attempt import begin, outcome
from launch.checks import read_recipe
from launch.hosts import LOCAL_HOSTS, run_over

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = recipe_parser("python -m launch", __doc__)
    parser.add_argument("--hostfile", type=Path, required=True, help="lines: HOST slots=RANKS")
    parser.add_argument("--master_addr", help="the first host's address for the others")
    parser.add_argument("--master_port", type=int, default=29500)
    arguments = parser.parse_intermixed_args(argv)
    redact_output()
    return start(arguments)


def start(arguments: argparse.Namespace) -> int:
    """Run over the hosts and return the exit code. Raises UserError before anything is started."""
    hosts = read_hostfile(arguments.hostfile)
    recipe = read_recipe(arguments, sum(hosts.values()))
    first = next(iter(hosts))
    address = arguments.master_addr or ("127.0.0.1" if first in LOCAL_HOSTS else first)
    logs = begin(recipe, hosts=hosts, arguments=[arguments.recipe, *arguments.overrides])
    passed = [arguments.recipe, *arguments.overrides]
    if arguments.stage:
        passed += ["--stage", arguments.stage]
    if arguments.trust_checkpoint:
        passed.append("--trust-checkpoint")
    code = run_over(hosts, passed, f"{address}:{arguments.master_port}", logs)
    ending = outcome(recipe, arguments.stage)
    if code:
        print(f"failed with code {code}; logs: {logs}", file=sys.stderr, flush=True)
    elif ending == "failed":  # a launcher that reports success when its child died
        code = 1
        print(f"ranks ended without a word; logs: {logs}", file=sys.stderr, flush=True)
    else:
        print(f"{ending}: {recipe.run_dir}; logs: {logs}", flush=True)
        code = EXIT_STOPPED if ending == "stopped" else 0
    return code


if __name__ == "__main__":
    sys.exit(main())
