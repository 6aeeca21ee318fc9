"""The benchmarks run and compare like with like; no timing is tested."""

from pathlib import Path

import pytest

from benchmarks.contestants import Ours, Webdataset
from benchmarks.loader import balance, make_samples, race, touch
from data_tools.builder import build
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "shards"
    build(make_samples(40), out, arguments={}, shard_size=16)
    return out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_reader_delivers_the_same_bytes(folder: Path, num_workers: int) -> None:
    contestants = [Webdataset(folder), Ours(folder, True), Ours(folder, False)]
    found = race(contestants, num_workers, None, rounds=1, num_bytes=40)
    assert found.keys() == {contestant.name for contestant in contestants}
    assert found["webdataset"]["ratio_to_webdataset"]["median"] == 1


def test_other_bytes_are_noticed(folder: Path, tmp_path: Path) -> None:
    build(make_samples(39), tmp_path / "fewer", arguments={}, shard_size=16)
    with pytest.raises(AssertionError, match="delivered other bytes"):
        race([Webdataset(folder), Ours(tmp_path / "fewer", True)], 0, None, 1, 40)
    reader = ShardReader(ShardIndex.load(folder))
    assert touch(reader.members(0)) != touch(reader.members(1))


def test_the_plan_pads_and_waits_less_than_chance() -> None:
    chance, dealt, sorted_too = balance(4000).values()
    assert 1 <= sorted_too["padded"] < dealt["padded"] < chance["padded"]
    assert 1 <= sorted_too["waiting"] < dealt["waiting"] < chance["waiting"]
