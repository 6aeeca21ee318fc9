"""Finds the recipes that come with the package by their names."""

from pathlib import Path


def find_recipe(name: str) -> Path:
    """Return `name` as a path, or the packaged recipe if only the package has that name."""
    packaged = Path(__file__).resolve().parent / f"{name.removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() and not Path(name).is_file() else Path(name)
