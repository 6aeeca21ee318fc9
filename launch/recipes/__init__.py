"""The recipes that come with the package, found by their names."""

from pathlib import Path


def find_recipe(name: str) -> Path:
    """A path as given, else a recipe that comes with the package."""
    packaged = Path(__file__).resolve().parent / f"{name.removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() and not Path(name).is_file() else Path(name)
