"""Finds the files of a split in a folder as hubs lay it out: train-00000-of-00002.parquet, ...

Training and test files often lie side by side. Which are meant is never guessed: where file or
folder names say splits, --split says which, and several only by their names.
"""

import re
from pathlib import Path

from genrecal_ds.errors import UserError

_SPLITS = {
    "train", "training", "validation", "valid", "val", "dev", "test", "testing", "testmini", "eval",
}  # fmt: skip
_PIECE = re.compile(r"-\d+(-of-\d+)?$")


def files_of(path: Path, ending: str, split: str | None) -> list[Path]:
    """The files of SOURCE, by name: one file, or those of a folder, of its data/ or split folders.

    Raises UserError where there are none, and where they are of several splits and none is chosen.
    """
    if path.is_file():
        return choose(path, {split_of(path) or "": [path]}, split)
    files = _listed(path, ending) or _listed(path / "data", ending)
    files = files or [
        file
        for file in sorted(path.glob(f"*/*{ending}"))
        if file.parent.name.lower() in _SPLITS and _is_seen(file)
    ]
    if not files:
        below = sorted({file.parent.relative_to(path) for file in path.glob(f"**/*{ending}")})
        hint = f"name one of {', '.join(map(str, below[:5]))}" if below else "name a folder of them"
        raise UserError(f"{path}: lacks any {ending} file; {hint}")
    if not any(map(split_of, files)):
        return choose(path, {"": files}, split)
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(split_of(file) or _PIECE.sub("", file.stem), []).append(file)
    return choose(path, groups, split)


def choose(path: Path, groups: dict[str, list[Path]], split: str | None) -> list[Path]:
    """The files of the split, or of the splits `a+b`; without one, of the only group."""
    if split is None:
        if len(groups) == 1:
            return next(iter(groups.values()))
        names = sorted(groups, key=lambda name: (name != "train", name))
        raise UserError(
            f"{path}: holds the splits {', '.join(names)}; choose --split {names[0]}, or several "
            f"by name: --split {names[0]}+{names[1]}"
        )
    known = sorted(name for name in groups if name)
    for name in split.split("+"):
        if name not in known:
            offered = f"has {', '.join(known)}" if known else "has no file named after a split"
            raise UserError(f"--split {split}: {path} {offered}")
    return [file for name in split.split("+") for file in groups[name]]


def split_of(file: Path) -> str | None:
    """The split that a file's name, or its folder's, says."""
    words = re.split(r"[^a-z0-9]+", file.stem.lower())
    named = [word for word in words if word in _SPLITS]
    if named:
        return named[-1]
    folder = file.parent.name.lower()
    return folder if folder in _SPLITS else None


def _listed(folder: Path, ending: str) -> list[Path]:
    return sorted(file for file in folder.glob(f"*{ending}") if _is_seen(file))


def _is_seen(file: Path) -> bool:
    """Not a hidden file: macOS leaves ._a.tar beside a.tar."""
    return not file.name.startswith(".")
