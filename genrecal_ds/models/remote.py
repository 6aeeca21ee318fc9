"""Refuses model folders with code of their own unless the recipe lists each file's sha256.

Permission goes by content, not by place. A student exported from such a folder carries the same
files and may run. A folder with one byte more may not. No file of a folder is imported before all
files were compared.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from genrecal_ds.errors import UserError
from genrecal_ds.models.families import FAMILIES, Family

_allowed: set[frozenset[tuple[str, str]]] = set()


def code_of(folder: str | Path) -> dict[str, str]:
    """{path in the folder: sha256 hex} of every Python file below it."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.py"))
    }


def allow(folder: str | Path, files: Mapping[str, str], family: Family) -> None:
    """Let exactly these files run, and know the folder's model_type by the recipe's facts.

    Raises UserError naming the first file that is not as listed, or a model_type whose facts
    are known already.
    """
    code = code_of(folder)
    for name in sorted(code.keys() | dict(files).keys()):
        if code.get(name) != files.get(name):
            listed = files.get(name, "not listed")
            raise UserError(
                f"allow_remote_code.files: {Path(folder) / name} is {code.get(name, 'missing')}, "
                f"the recipe says {listed}; read the file, then list its sha256"
            )
    model_type = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    if model_type in FAMILIES and FAMILIES[model_type] != family:
        raise UserError(
            f"allow_remote_code: transformers has {model_type} of its own; remove the key"
        )
    FAMILIES[model_type] = family
    _allowed.add(frozenset(code.items()))


def is_allowed(folder: str | Path) -> bool:
    """Whether code of this folder may run: the folder has code, and every file of it is listed."""
    code = code_of(folder)
    return bool(code) and frozenset(code.items()) in _allowed
