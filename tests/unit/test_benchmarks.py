"""The benchmarks run and compare like with like; no timing is tested."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import head_cases, ops
from benchmarks.contestants import Ours, Webdataset
from benchmarks.head_cases import Numbers
from benchmarks.loader import balance, make_samples, race, touch
from benchmarks.race import peak_bytes, without_failures
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


def test_cases_of_the_operations_run_and_their_contestants_agree(tmp_path: Path, capsys) -> None:
    """At toy size; head_case itself raises when two contestants compute different gradients."""
    out = tmp_path / "ops.json"
    assert ops.main(["--rounds", "1", "--scale", "0.02", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert {row["case"] for row in results} == set(ops.CPU_CASES)
    assert "| C1 | N=20 " in capsys.readouterr().out
    for row in results:
        first = next(iter(row["contestants"].values()))
        assert first["ratio"]["median"] == 1 and len(row["contestants"]) > 1


def test_another_loss_is_noticed() -> None:
    numbers = Numbers(32, 16, 128, torch.float32)
    doubled = {"truth": head_cases.naive(numbers), "doubled": lambda: 2 * numbers.leaf()}
    with pytest.raises(AssertionError, match="doubled differs from truth"):
        head_cases.agree(doubled, "truth", 0.1)
    with pytest.raises(SystemExit):
        ops.main(["--cases", "G1"])


def test_a_peer_that_fails_is_entered_as_failed() -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("no room")

    good = {"yardstick": lambda: None, "ours": lambda: None}
    running, failed = without_failures({**good, "peer": out_of_memory})
    assert list(running) == ["yardstick", "ours"]
    assert failed == {"peer": "OutOfMemoryError: no room"}
    with pytest.raises(torch.OutOfMemoryError):
        without_failures({"yardstick": lambda: None, "ours": out_of_memory})


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    def two_megabytes() -> None:
        torch.ones(1 << 18).sum()
        kept = torch.ones(1 << 18)
        (kept + 1).sum()

    assert peak_bytes(two_megabytes) == pytest.approx(2 << 20, rel=0.01)


def test_gpu_cases_are_written_for_every_case_of_the_page() -> None:
    assert list(ops.GPU_CASES) == ["G1", "G2", "G4", "G5", "G6", "G7"]
