"""Verdicts follow their evidence: rejects are judged again when their pictures changed, only then.

And the closing table of a build.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_tools.build import main
from data_tools.sources.files import ImageRoot
from genrecal_ds.data.index import ShardIndex
from tests.unit.data_tools.test_builder import contents

pytestmark = pytest.mark.unit
NUM_ROWS = 25


def picture(folder: Path, number: int) -> None:
    Image.new("RGB", (12, 9), (number, 1, 2)).save(folder / f"{number}.png")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """25 rows in kinds of their own, of which the pictures of 3, 4 and 17 are missing."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(NUM_ROWS):
        if number not in (3, 4, 17):
            picture(folder, number)
        row = {"id": f"r{number}", "image": f"{number}.png", "question": "q", "answer": "x"}
        rows.append({**row, "kind": f"kind{number % 4}", "score": 1})
    (folder / "x.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Callable[..., int]:
    def command(*options: str, out: str = "out") -> int:
        place = ["--out", str(tmp_path / out), "--shard-size", "6", "--workers", "1"]
        return main([str(source / "x.json"), "--format", "llava", *place, *options])

    return command


def rejected(folder: Path) -> list[str]:
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return [json.loads(line)["source_id"] for line in lines]


def test_above_the_limit_a_rerun_retries_what_changed(
    run: Callable[..., int], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run() == 1 and rejected(tmp_path / "out") == ["r3", "r4", "r17"]
    assert run() == 1, "nothing changed"
    picture(source, 3)
    picture(source, 17)
    opened = []
    read = ImageRoot.read
    monkeypatch.setattr(
        ImageRoot, "read", lambda self, name: opened.append(name) or read(self, name)
    )
    assert run("--max-reject-rate", "0.1") == 0
    assert opened == ["3.png", "17.png"], "exactly the rejects whose pictures changed"
    assert rejected(tmp_path / "out") == ["r4"]
    assert run("--max-reject-rate", "0.1", out="fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_finished_folder_says_what_it_would_redo_and_does_it_when_asked(
    run: Callable[..., int], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lax = ("--max-reject-rate", "0.5")
    assert run(*lax) == 0 and len(ShardIndex.load(tmp_path / "out")) == NUM_ROWS - 3
    before = contents(tmp_path / "out")
    assert run(*lax, "--retry-rejects") == 0
    assert "nothing to do" in capsys.readouterr().out
    picture(source, 4)
    (source / "17.png").write_bytes(b"half a download")
    assert run(*lax) == 0
    out = capsys.readouterr().out
    assert "the pictures of 2 rejects changed since, the first of row 4; --retry-rejects" in out
    assert contents(tmp_path / "out") == before, "only said"
    assert run(*lax, "--retry-rejects") == 0
    assert rejected(tmp_path / "out") == ["r3", "r17"]
    assert run(*lax, out="fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    picture(source, 17)
    picture(source, 3)
    assert run("--retry-rejects") == 0 and rejected(tmp_path / "out") == []
    assert run(out="whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_same_size_and_another_time_is_a_change(
    run: Callable[..., int], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (source / "5.png").read_bytes()
    (source / "5.png").write_bytes(good[:-20] + bytes(20))
    assert run("--max-reject-rate", "0.5") == 0 and "r5" in rejected(tmp_path / "out")
    (source / "5.png").write_bytes(good)
    os.utime(source / "5.png", ns=(1, 1))
    assert run("--max-reject-rate", "0.5", "--retry-rejects") == 0
    assert "r5" not in rejected(tmp_path / "out")


def test_good_samples_stay_though_their_pictures_went(
    run: Callable[..., int], source: Path, tmp_path: Path
) -> None:
    assert run("--max-reject-rate", "0.5") == 0
    (source / "5.png").unlink()
    picture(source, 3)
    assert run("--max-reject-rate", "0.5", "--retry-rejects") == 0
    assert rejected(tmp_path / "out") == ["r4", "r17"]


def test_the_closing_table(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max-reject-rate", "0.5") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines[:4] == [
        ["read", "answer", "22"], ["read", "image", "22"], ["read", "question", "22"],
        ["unread", "score", "22"],
    ]  # fmt: skip
    assert lines[4][:5] == ["rejected", "image_missing", "3", "first", "'r3':"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["unread"] == {"score": 22} and manifest["rejected"] == {"image_missing": 3}


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_unread_content_ends_the_build_which_goes_on_when_it_is_ignored(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: str
) -> None:
    rows = json.loads((source / "x.json").read_text())
    rows = [row for row in rows if row["id"] not in ("r3", "r4", "r17")]
    (source / "y.json").write_text(json.dumps([*rows[:15], {**rows[15], "crop_image": "0.png"}]))
    command = [str(source / "y.json"), "--format", "llava", "--shard-size", "6"]
    command += ["--out", str(tmp_path / "out"), "--workers", num_workers]
    assert main(command) == 2
    assert "item 'r18': key 'crop_image' looks like content" in capsys.readouterr().err
    assert not (tmp_path / "out/manifest.json").exists()
    assert main([*command, "--ignore", "crop_image"]) == 0
    assert "unread    crop_image" in capsys.readouterr().out
    assert main([*command, "--ignore", "image"]) == 2, "another build: no picture is read"
    assert "already built with ignore=None, asked for ['image']" in capsys.readouterr().err
