"""A PATH that would end DeepSpeed is refused in one line, and no other is."""

import subprocess
import sys

import pytest

from genrecal_ds.errors import UserError
from genrecal_ds.training.search_path import refuse_closed_folders
from launch.train import main
from tests.fixtures import recipe_tree, write_recipe

pytestmark = pytest.mark.unit


@pytest.fixture
def closed(tmp_path) -> str:
    """What root, too, may not run there; to another user a folder of root's says the same."""
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "numactl").write_text("#!/bin/sh\n")
    with pytest.raises(PermissionError):  # what DeepSpeed would end with
        subprocess.run(["numactl"], env={"PATH": str(folder)})
    return str(folder)


def test_a_closed_folder_is_named(closed, tmp_path):
    with pytest.raises(UserError, match=f"PATH: {closed} may not be searched, .* install numactl"):
        refuse_closed_folders(f"{tmp_path}/none:{closed}")


def test_a_folder_that_is_not_there_and_a_numactl_that_is_are_fine(closed, tmp_path):
    assert refuse_closed_folders(f"{tmp_path}/none:{tmp_path}:/dev/null") is None
    command = tmp_path / "open/numactl"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    assert refuse_closed_folders(f"{closed}:{command.parent}") is None


def test_a_run_says_so_before_it_begins(closed, tmp_path, pair, shards, monkeypatch, capsys):
    tree = recipe_tree(tmp_path, pair, shards, stages=[{"kind": "sft", "steps": 1}])
    recipe = write_recipe(tmp_path / "r.yaml", **tree)
    monkeypatch.setenv("PATH", closed)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    with monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):  # a run replaces them, see redact_output
            patched.setattr(sys, name, getattr(sys, name))
        assert main([str(recipe)]) == 2
    assert capsys.readouterr().err.startswith(f"error: PATH: {closed} may not be searched")
    assert not (tmp_path / "run").exists()
