"""Writes docs/map.md, the file map, from the first lines of the modules' docstrings.

    python -m tests.file_map        `make map`

tests/unit/test_architecture.py compares the file with the tree.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "docs/map.md"
PACKAGES = ("genrecal_ds", "launch", "data_tools")

# Folders that hold no __init__.py, and so have no docstring.
FOLDERS = {
    "docs": "Explains the method, models, data, recipes, results and reliability; keeps the log.",
    "requirements": "Pins the exact versions that `make demo` and `make test` use.",
    "genrecal_ds/planner/models": "Holds the config.json facts of the models that the paper names.",
    "launch/containers": "Holds a Dockerfile and an Apptainer definition.",
    "launch/grids": "Holds the arms, conditions and seeds that genrecal_ds.ablate runs.",
    "launch/recipes": "Holds one YAML file per run; copy recommended.yaml or faithful.yaml.",
    "launch/recipes/demo": "Holds the demo's recipes: teacher, baseline, genrecal, controls.",
    "launch/recipes/real": "Holds the recipes of `make real`: SFT, byte KL, GenRecal.",
    "launch/slurm": "Holds SLURM job scripts: training, stages as jobs, arrays, evaluation.",
    "launch/studies": "Holds one shell script for each study of docs/results.md.",
}

HEAD = """\
# File map

`make map` writes this file from the first line of every module's docstring; a test compares it
with the tree. To change a line, change the docstring. [README.md](../README.md) says in which
order to read the code, [CONTRIBUTING.md](../CONTRIBUTING.md) which file to open for a change.
"""


def write() -> None:
    MAP.write_text(map_text())


def map_text() -> str:
    """What docs/map.md must hold. Raises SystemExit naming a module or folder without a line."""
    tops = sorted(
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and (path.name in FOLDERS or (path / "__init__.py").is_file())
    )
    overview = "\n".join(_line(f"{name}/", first_line(ROOT / name), 0) for name in tops)
    parts = [HEAD, f"## Folders\n\n```\n{overview}\n```\n"]
    for package in PACKAGES:
        body = "\n".join(_entries(ROOT / package, 0))
        parts.append(f"## {package}\n\n```\n{body}\n```\n")
    return "\n".join(parts)


def first_line(path: Path) -> str:
    """The first line of a module's or package's docstring, or a folder's entry in FOLDERS."""
    place = path.relative_to(ROOT).as_posix()
    if place in FOLDERS:
        return FOLDERS[place]
    module = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(module.read_text())) if module.is_file() else None
    if not text:
        raise SystemExit(f"{place}: no docstring, and no line in FOLDERS of tests/file_map.py")
    return text.splitlines()[0]


def _entries(folder: Path, depth: int) -> Iterator[str]:
    """Lines of a folder's modules, then of its folders with what is in them."""
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield _line(path.name, first_line(path), depth)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.*")):
            yield _line(f"{path.name}/", first_line(path), depth)
            yield from _entries(path, depth + 1)


def _line(name: str, text: str, depth: int) -> str:
    return f"{'  ' * depth + name:25} {text}"


if __name__ == "__main__":
    write()
