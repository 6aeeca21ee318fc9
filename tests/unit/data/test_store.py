"""Local folders, and the node's cache in front of mounted or remote ones."""

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.data.store import ShardStore, StoreError
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit


def read_all(index: ShardIndex) -> list[str]:
    reader = ShardReader(index)
    found = [reader.read(number).key for number in range(len(index))]
    reader.close()
    return found


def cached(location: str | Path, cache: Path, **settings: int) -> ShardStore:
    return ShardStore(str(location), ("file",), cache, **settings)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_reads_through_the_cache(shards: Path, built: Path, tmp_path: Path, scheme: str) -> None:
    cache = tmp_path / "cache"
    index = ShardIndex.load(cached(f"{scheme}{shards}", cache))
    assert index.fingerprint == ShardIndex.load(built).fingerprint
    assert not list(cache.glob("*.tar")), "a start reads manifest and index only"
    first = ShardReader(index)
    first.read(0)
    assert [path.stem for path in cache.glob("*.tar")] == [index.shards[0].sha256]
    expected = read_all(ShardIndex.load(built))
    assert read_all(index) == expected
    assert len(list(cache.glob("*.tar"))) == 3 and not list(cache.glob(".*.tmp"))
    copy = pickle.loads(pickle.dumps(index))
    for path in shards.glob("*.tar"):
        path.write_bytes(b"the slow storage is gone")
    assert read_all(copy) == expected


def test_shards_of_one_name_do_not_meet(shards: Path, built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    from data_tools.builder import build
    from data_tools.sources import Rows
    from tests.unit.data.conftest import raw_sample

    build(Rows("other", [raw_sample(n, 1) for n in range(5)]), other / "s", arguments={})
    cache = tmp_path / "cache"
    assert read_all(ShardIndex.load(cached(shards, cache)))[0] == "unit/000000000"
    assert read_all(ShardIndex.load(cached(other / "s", cache)))[0] == "other/000000000"


def test_damaged_or_cut_copy_never_enters(shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    index = ShardIndex.load(cached(shards, cache))
    path = shards / "shard-000001.tar"
    whole = path.read_bytes()
    for damage in (whole[:-600], whole[:5000] + b"x" + whole[5001:]):
        path.write_bytes(damage)
        with pytest.raises(BadSample, match="shard-000001.tar: sha256 is not the manifest's"):
            ShardReader(index).read(10)
        assert not list(cache.glob("*.tar")) and not list(cache.glob(".*.tmp"))
    path.write_bytes(whole)
    assert ShardReader(index).read(10).key == "unit/000000010"


def test_least_recently_used_goes_first(shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    plain = ShardIndex.load(shards)
    room = plain.shards[0].num_bytes + plain.shards[1].num_bytes
    index = ShardIndex.load(cached(shards, cache, max_cache_bytes=room))
    held = ShardReader(index)
    for number, age in ((0, 100), (10, 50)):
        held.read(number)
        os.utime(cache / f"{index.shards[number // 8].sha256}.tar", (age, age))
    os.close(index.store.open(index.shards[0].name, index.shards[0].sha256))  # used again
    ShardReader(index).read(20)
    kept = {path.stem for path in cache.glob("*.tar")}
    assert kept == {index.shards[0].sha256, index.shards[2].sha256}
    assert held.read(11).key == "unit/000000011", "an open shard stays readable"
    assert read_all(index) == read_all(plain)


def read_in_process(store: ShardStore, results: "multiprocessing.Queue[list[str]]") -> None:
    results.put(read_all(ShardIndex.load(store)))


def test_ranks_of_a_node_share_the_cache(shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    room = ShardIndex.load(shards).shards[0].num_bytes  # every read evicts what others use
    for store in (cached(shards, cache), cached(shards, tmp_path / "small", max_cache_bytes=room)):
        results: multiprocessing.Queue[list[str]] = multiprocessing.Queue()
        ranks = [
            multiprocessing.Process(target=read_in_process, args=(store, results)) for _ in range(4)
        ]
        for rank in ranks:
            rank.start()
        found = [results.get(timeout=30) for _ in ranks]
        for rank in ranks:
            rank.join()
        assert all(keys == read_all(ShardIndex.load(shards)) for keys in found)
    assert len(list(cache.glob("*.tar"))) == 3


def test_remote_folder_is_checked_at_start(shards: Path, tmp_path: Path) -> None:
    store = cached(f"file://{shards}", tmp_path / "cache")
    os.truncate(shards / "shard-000001.tar", 5120)
    with pytest.raises(UserError, match=r"shard-000001\.tar: expected \d+ bytes, actual 5120"):
        ShardIndex.load(store)
    (shards / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="actual none: missing"):
        ShardIndex.load(store)
    (shards / "manifest.json").unlink()
    with pytest.raises(UserError, match="see data.remote and data.cache"):
        ShardIndex.load(store)


@pytest.mark.parametrize(
    "location",
    ["pipe:touch MARKER", " PIPE:touch MARKER", "pipe://touch MARKER", "http://x.org/s",
     "https://x.org/s", "s3://bucket/s", "hf://datasets/x", "sftp://x/s", "memory://x",
     "simplecache::s3://bucket/s", "file::pipe:touch MARKER", "x\0y", "S3://bucket"],
)  # fmt: skip
def test_only_allowed_schemes_are_opened(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://=pipe:touch {marker}")
    monkeypatch.chdir(tmp_path)
    location = location.replace("MARKER", str(marker))
    for allowed in ((), ("file",), ("pipe", "http", "https", "sftp", "memory")):
        with pytest.raises(UserError, match="local folder only"):
            ShardIndex.load(ShardStore(location, allowed, tmp_path / "cache"))
    assert not marker.exists()


def test_remote_needs_a_cache_and_its_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs data.cache"):
        ShardStore("s3://bucket/shards", ("s3",))
    store = ShardStore("gs://bucket/shards", ("gs",), tmp_path / "cache")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install genrecal_ds\[cloud\]"):
            store.fetch_small("manifest.json")


def test_links_are_not_followed(shards: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(cached(shards, tmp_path / "cache"))
    path = shards / "shard-000000.tar"
    path.rename(tmp_path / "elsewhere.tar")
    path.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(StoreError, match="OSError"):
        index.store.open(path.name, index.shards[0].sha256)
