"""The studies' commands name modules, files and keys that there are: a study takes hours."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from genrecal_ds.recipe.recipe_file import load_recipe
from tests.fixtures import ROOT

pytestmark = pytest.mark.unit

STUDIES = sorted((ROOT / "launch/studies").glob("*.sh"))
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def commands_of(study: Path, folder: Path, **env: str) -> list[list[str]]:
    """What the study would run: its script in a project whose python writes its arguments down."""
    script, python = folder / "launch/studies" / study.name, folder / ".venv/bin/python"
    setup = folder / "launch/setup_env.sh"
    for path, text in (
        (script, study.read_text()),
        (python, RECORDER.format(python=sys.executable)),
        (setup, "#!/bin/sh\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    record = folder / "record"
    done = subprocess.run(
        ["bash", script], capture_output=True, text=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "RECORD": str(record), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_command_of_a_study_names_what_there_is(study, tmp_path):
    commands = commands_of(study, tmp_path)
    assert len(commands) >= 4
    for command in commands:
        for word in command:
            assert not word.startswith("launch/") or (ROOT / word).is_file(), word
        if command[0] == "launch/train.py":
            load_recipe(ROOT / command[1], [word for word in command[2:] if "=" in word])
        else:
            assert command[0] == "-m" and importlib.util.find_spec(command[1]), command


def test_a_study_runs_as_many_jobs_as_it_is_told(tmp_path):
    study = ROOT / "launch/studies/ablation.sh"
    for number, (env, jobs) in enumerate((({}, "2"), ({"JOBS": "5"}, "5"))):
        commands = commands_of(study, tmp_path / str(number), **env)
        grids = [words for words in commands if "genrecal_ds.ablate" in words]
        assert [words[words.index("--jobs") + 1] for words in grids] == [jobs, jobs]
