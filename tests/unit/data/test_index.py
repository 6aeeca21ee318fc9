"""Start-up checks: what is refused, and that the message names the file and the numbers."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrecal_ds.data.index import IMAGE_COST, ShardIndex
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def manifest_shards(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "manifest.json").read_text())["shards"]


def test_load(built: Path) -> None:
    index = ShardIndex.load(built)
    assert len(index) == 23 and [shard.count for shard in index.shards] == [8, 8, 7]
    assert isinstance(index.records, np.memmap) and not index.records.flags.writeable
    assert index.classes.tolist() == [number % 3 for number in range(23)]
    assert [index.kinds[code] for code in index.records["kind"][:3]] == ["text", "one", "many"]
    assert index.records["max_width"][:3].tolist() == [0, 12, 13]
    assert index.records["max_height"][:3].tolist() == [0, 9, 9]
    text = len("question 000") + len("answer 000")
    assert index.costs()[:3].tolist() == [text, text + IMAGE_COST, text + 2 * IMAGE_COST]
    assert index.costs(image_cost=1).dtype == np.int64
    assert index.build == {"seed": 0, "source_digest": ""}
    index.records["shard"].sum()


def test_fingerprint_follows_the_content(built: Path, shards: Path) -> None:
    fingerprint = ShardIndex.load(built).fingerprint
    assert len(fingerprint) == 64
    assert ShardIndex.load(shards).fingerprint == fingerprint, "it must not depend on the place"
    entries = manifest_shards(shards)
    entries[1]["sha256"] = "0" * 64
    edit_manifest(shards, shards=entries)
    assert ShardIndex.load(shards).fingerprint != fingerprint


def test_pickles_as_a_reference(shards: Path) -> None:
    index = ShardIndex.load(shards)
    data = pickle.dumps(index)
    assert len(data) < 1000
    assert pickle.loads(data).fingerprint == index.fingerprint
    entries = manifest_shards(shards)
    entries[1]["sha256"] = "0" * 64
    edit_manifest(shards, shards=entries)
    with pytest.raises(UserError, match="changed while in use"):
        pickle.loads(data)


def test_truncated_shard(shards: Path) -> None:
    index = ShardIndex.load(shards)
    path = shards / "shard-000001.tar"
    size = path.stat().st_size
    cut = int(index.records["offset"][11])  # a member boundary: webdataset alone says nothing
    os.truncate(path, cut)
    with pytest.raises(UserError, match=rf"shard-000001.tar: expected {size} bytes, actual {cut}"):
        ShardIndex.load(shards)
    assert len(ShardIndex.load(shards, check_files=False).file_defects()) == 1


def test_missing_extra_and_linked_shards(shards: Path) -> None:
    path = shards / "shard-000002.tar"
    moved = path.rename(shards / "other.tar")
    with pytest.raises(UserError, match="shard-000002.tar: missing"):
        ShardIndex.load(shards)
    path.symlink_to(moved)
    with pytest.raises(UserError, match="shard-000002.tar: not a regular file"):
        ShardIndex.load(shards)
    path.unlink()
    path.write_bytes(moved.read_bytes())
    with pytest.raises(UserError, match="other.tar: not in the manifest"):
        ShardIndex.load(shards)


@pytest.mark.parametrize(
    "location",
    ["pipe:{}", " PIPE:{}", "file://{}", "s3://bucket/x", "hf://x", "https://h/x", "{}::{}"],
)
def test_urls_are_refused(shards: Path, tmp_path: Path, location: str) -> None:
    marker = tmp_path / "marker"
    target = f"touch {marker}" if "pipe" in location.lower() else str(shards)
    with pytest.raises(UserError, match="local folder only"):
        ShardIndex.load(location.format(target, target))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch marker", "../shard-000000.tar", "/etc/passwd", "a/b.tar", ".tar", "", None]
)
def test_hostile_shard_names(shards: Path, name: str | None) -> None:
    entries = manifest_shards(shards)
    edit_manifest(shards, shards=[{**entries[0], "name": name}, *entries[1:]])
    with pytest.raises(UserError, match="is not a local shard"):
        ShardIndex.load(shards)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": []}, "shards is empty"),
        ({"shards": "x"}, "shards is not a list"),
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"index_sha256": "0" * 64}, "index.npy: sha256"),
        ({"kinds": ["one"]}, "does not fit"),
    ],
)
def test_edited_manifest(shards: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(shards, **changes)
    with pytest.raises(UserError, match=message):
        ShardIndex.load(shards)


def test_shard_list_and_index_must_agree(shards: Path) -> None:
    entries = manifest_shards(shards)
    edit_manifest(shards, shards=entries[:2])
    with pytest.raises(UserError, match="does not fit"):
        ShardIndex.load(shards)
    edit_manifest(shards, shards=[entries[0], entries[0], entries[2]])
    with pytest.raises(UserError, match="repeats a name"):
        ShardIndex.load(shards)


def test_damaged_index_and_unfinished_build(shards: Path) -> None:
    path = shards / "index.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="index.npy: sha256"):
        ShardIndex.load(shards)
    path.unlink()
    with pytest.raises(UserError, match="index.npy: unreadable"):
        ShardIndex.load(shards)
    (shards / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest"):
        ShardIndex.load(shards)
    (shards / "manifest.json").unlink()
    with pytest.raises(UserError, match="build is not finished"):
        ShardIndex.load(shards)
    with pytest.raises(UserError, match="no such folder"):
        ShardIndex.load(shards / "nowhere")
