"""Writes the functions of the installed standard library as questions and answers.

    python -m launch.real.functions OUT --train 400 --heldout 64

OUT gets train.jsonl and heldout.jsonl, conversations in LLaVA's form: signature and docstring are
the question, the body is the answer. Held-out functions are those of other modules, so that no
neighbour of theirs is trained on. The same Python gives the same files.
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from genrecal_ds.console.arguments import command_parser, positive
from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
MOST_QUESTION, LEAST_ANSWER, MOST_ANSWER = 400, 60, 400  # characters
HELDOUT_SHARE = 6  # one module in so many
ASKED = "Write the body of this Python function: no signature, no docstring, no code fence.\n\n"


def functions(library: Path) -> Iterator[tuple[str, str, str]]:
    """(module, signature with docstring, body) of every short function with a docstring."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if LEFT_OUT & set(place.parts):
            continue
        try:
            text = path.read_text()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.body[1:]:
                question, answer = _split(node, text.splitlines())
                is_short = len(question) <= MOST_QUESTION
                if is_short and LEAST_ANSWER <= len(answer) <= MOST_ANSWER:
                    yield place.with_suffix("").as_posix(), question, answer


def _split(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str]:
    """What comes before a function's second statement, and the rest; both start at column 0."""
    begin = node.body[0].end_lineno
    question = textwrap.dedent("\n".join(lines[node.lineno - 1 : begin]))
    return question, textwrap.dedent("\n".join(lines[begin : node.end_lineno])).strip("\n")


def is_heldout(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] % HELDOUT_SHARE == 0


def conversation(number: int, question: str, answer: str) -> dict[str, object]:
    turns = [("human", ASKED + question), ("gpt", answer)]
    return {
        "id": f"{number:05d}",
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


def write(out: Path, sizes: dict[str, int]) -> None:
    """Write the first functions of each split in the order of a hash. UserError: too few."""
    found = {(question, answer): module for module, question, answer in
             functions(Path(sysconfig.get_paths()["stdlib"]))}  # fmt: skip
    order = sorted(found, key=lambda pair: hashlib.sha256("".join(pair).encode()).digest())
    out.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        own = [pair for pair in order if is_heldout(found[pair]) == (split == "heldout")]
        if len(own) < size:
            raise UserError(f"--{split} {size}: this Python has {len(own)} such functions")
        rows = [json.dumps(conversation(n, *pair)) for n, pair in enumerate(own[:size])]
        (out / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{split}: {size} of {len(own)} functions")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m launch.real.functions", __doc__)
    parser.add_argument("out", type=Path)
    for split in ("train", "heldout"):
        parser.add_argument(f"--{split}", type=positive(int), required=True, metavar="N")
    given: argparse.Namespace = parser.parse_args(argv)
    write(given.out, {"train": given.train, "heldout": given.heldout})
    return 0


if __name__ == "__main__":
    sys.exit(main())
