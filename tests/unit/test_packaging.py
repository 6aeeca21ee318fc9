"""An installed wheel holds every module, recipe and template, and works from another folder."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("genrecal_ds", "data_tools", "ds_configs", "launch")
SHIPPED = (".py", ".yaml", ".json", ".jinja", ".sbatch", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools < 77; pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"  # setuptools leaves build/ and *.egg-info where it builds
    copy.mkdir()
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = "wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir".split()
    subprocess.run([sys.executable, "-m", "pip", *command, folder, copy], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in SHIPPED and "__pycache__" not in path.parts
    }
    assert expected - names == set()
    assert {"genrecal_ds/py.typed", "genrecal_ds/recipe/config.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_from_another_folder(wheel: Path, tmp_path: Path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    program = (
        "from pathlib import Path\n"
        "import ds_configs, genrecal_ds, launch\n"
        "from genrecal_ds.recipe.recipe_file import load_ds_config, load_recipe\n"
        "home = Path(genrecal_ds.__file__).parents[1]\n"
        "configs = [load_ds_config(p.stem) for p in (home / 'ds_configs').glob('*.json')]\n"
        "recipes = [load_recipe(p) for p in (home / 'launch' / 'recipes').rglob('*.yaml')]\n"
        "print(home, len(configs), len(recipes), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_configs = len(list((ROOT / "ds_configs").glob("*.json")))
    num_recipes = len(list((ROOT / "launch" / "recipes").rglob("*.yaml")))
    assert done.stdout.split() == [str(installed), str(num_configs), str(num_recipes)]


def test_a_checkout_and_a_wheel_know_the_torch_range_of_setup(wheel: Path, tmp_path: Path):
    bounds = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text())
    assert bounds is not None
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "from launch.checks import SETUP, torch_range\n"
        "print(SETUP, SETUP.is_file(), *torch_range())\n"
    )
    for home, has_setup in ((ROOT, True), (tmp_path, False)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        expected = [str(home / "setup.py"), str(has_setup), *bounds.groups()]
        assert done.stdout.split() == expected
