"""Defines the arguments that several commands of launch take."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from genrecal_ds.console.arguments import command_parser


def recipe_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for a recipe, overrides of its keys, and a stage."""
    parser = command_parser(prog, description)
    parser.add_argument("recipe", help="a YAML file, or the name of one in launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage", help="train this one of the recipe's stages only")
    parser.add_argument(
        "--trust-checkpoint", action="store_true",
        help="load checkpoints that others own or may write: they are code",
    )  # fmt: skip
    return parser


def train_arguments(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """Parse the arguments of launch/train.py."""
    parser = recipe_parser("launch/train.py", description)
    parser.add_argument("--hostfile", type=Path, help="start over these hosts (see README)")
    parser.add_argument("--master_addr", help=argparse.SUPPRESS)  # with --hostfile
    parser.add_argument("--master_port", help=argparse.SUPPRESS)
    parser.add_argument(
        "--cache-only", action="store_true",
        help="write the teacher's rows that distill will read (teacher.cache), train nothing",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    arguments = parser.parse_intermixed_args(argv)
    if arguments.trust_checkpoint:
        arguments.overrides.append("checkpoint.trust=true")
    return arguments
