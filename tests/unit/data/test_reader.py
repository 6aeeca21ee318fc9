"""Reading by byte range: right samples, every damage a BadSample, any process."""

import contextlib
import dataclasses
import gzip
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from data_tools.verify import main as verify
from genrecal_ds.data.index import ShardIndex, file_sha256
from genrecal_ds.data.reader import MAX_OPEN_SHARDS, BadSample, ShardReader

pytestmark = pytest.mark.unit


def open_reader(folder: Path) -> ShardReader:
    return ShardReader(ShardIndex.load(folder))


def record_json(num_images: int) -> bytes:
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": "q"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    messages = [{"role": "user", "content": parts}, answer]
    record = {"messages": messages, "kind": "k", "answers": [], "source": "s", "source_id": ""}
    return json.dumps(record).encode()


def bad_samples(reader: ShardReader) -> list[int]:
    found = []
    for number in range(len(reader)):
        try:
            reader.read(number)
        except BadSample:
            found.append(number)
    return found


def test_reads_every_sample_in_any_order(built: Path) -> None:
    reader = open_reader(built)
    for number in np.random.default_rng(0).permutation(len(reader)):
        sample = reader.read(int(number))
        assert sample.key == f"unit/{number:09d}"
        assert sample.kind == ("text", "one", "many")[number % 3]
        assert sample.answers == [f"answer {number:03d}"]
        assert sample.messages[1]["content"] == [{"type": "text", "text": f"answer {number:03d}"}]
        assert [image.size for image in sample.images] == [(12, 9), (13, 9)][: number % 3]
        assert all(image.getpixel((3, 3)) == (number, 1, 2) for image in sample.images)


def test_plain_webdataset_reads_the_same(built: Path) -> None:
    index = ShardIndex.load(built)
    paths = [str(built / shard.name) for shard in index.shards]
    plain = list(wds.WebDataset(paths, shardshuffle=False))
    reader = ShardReader(index)
    assert [sample["__key__"] for sample in plain] == [reader.read(i).key for i in range(23)]
    for number, sample in enumerate(plain):
        found = {name: data for name, data in sample.items() if not name.startswith("__")}
        assert found == reader.members(number), "the same bytes"
        images = {"0.png", "1.png"} if number % 3 == 2 else {"0.png"} if number % 3 else set()
        assert sample.keys() - {"__key__", "__url__", "__local_path__"} == images | {"json"}
        stored = json.loads(sample["json"])
        assert stored["messages"] == reader.read(number).messages
        assert stored["source_id"] == f"origin.{number}/../x"


def test_padding_slot_is_not_the_last_sample(built: Path) -> None:
    for number in (-1, 23):
        with pytest.raises(IndexError):
            open_reader(built).read(number)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("place", ["first header", "second header", "image body", "padding"])
def test_one_flipped_bit(shards: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = ShardIndex.load(shards)
    offset, length = int(index.records["offset"][10]), int(index.records["length"][10])
    data = (shards / "shard-000001.tar").read_bytes()[offset : offset + length]
    image = data.index(b"\x89PNG")
    position = {
        "first header": 150,  # the checksum field: webdataset alone would end here in silence
        "second header": image - 512 + 150,
        "image body": image + 45,
        "padding": length - 1,
    }[place]
    flip(shards / "shard-000001.tar", offset + position)
    reader = open_reader(shards)
    with pytest.raises(BadSample, match=r"shard-000001\.tar: sample 10, key unit/0+10: crc32") as e:
        reader.read(10)
    assert (e.value.shard, e.value.key) == ("shard-000001.tar", "unit/000000010")
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    assert bad_samples(reader) == [10], "the neighbours must stay readable"
    assert verify([str(shards)]) == 1
    assert "key unit/000000010" in capsys.readouterr().out


def test_swapped_shards_of_equal_size(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = shards / "shard-000000.tar", shards / "shard-000001.tar"
    one, two = first.read_bytes(), second.read_bytes()
    assert len(one) == len(two), "the case needs shards of one size"
    first.write_bytes(two)
    second.write_bytes(one)
    assert bad_samples(open_reader(shards)) == list(range(16))
    assert verify([str(shards)]) == 1
    out = capsys.readouterr().out
    assert out.count("is not the manifest's") == 2 and out.count("crc32") == 16


def test_damage_after_start(shards: Path) -> None:
    reader = open_reader(shards)
    os.truncate(shards / "shard-000000.tar", int(reader.index.records["offset"][3]) + 700)
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(BadSample, match="sample 3, key .*shard_truncated"):
        reader.read(3)
    assert bad_samples(reader) == [3, 4, 5, 6, 7, *range(16, 23)]
    (shards / "shard-000002.tar").symlink_to(shards / "shard-000001.tar")
    with pytest.raises(BadSample, match="shard_unreadable"):
        reader.read(16)


def test_verify_counts(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(shards)]) == 0
    assert "3 shards, 23 samples, sound" in capsys.readouterr().out
    (shards / "shard-000002.tar").unlink()
    os.truncate(shards / "shard-000000.tar", 5120)
    assert verify([str(shards)]) == 1
    out = capsys.readouterr().out
    assert "shard-000002.tar: missing" in out and "shard-000000.tar: expected" in out
    assert verify([str(shards / "nowhere")]) == 2


def test_verify_finds_samples_the_index_lacks(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = np.array(ShardIndex.load(shards).records)
    np.save(shards / "index.npy", records[:-1])
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["index_sha256"] = file_sha256(shards / "index.npy")
    manifest["shards"][2]["count"] = 6
    path.write_text(json.dumps(manifest))
    assert verify([str(shards)]) == 1
    out = capsys.readouterr().out
    assert "shard-000002.tar: webdataset's 7 keys are not the index's 6" in out


class Payload:
    """Unpickling it would create the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    ("extensions", "num_images", "reason"),
    [
        (["0.png"], 1, "no json"),
        (["json"], 1, "image_count"),
        (["json", "0.png"], 2, "image_count"),
        (["json", "0.pyd"], 1, "image_format"),
        (["json", "0.png", "x.pkl"], 1, "image_count"),
        (["json", "1.png"], 1, "no image 0"),
        (["json", "0.png", "0.png"], 1, "duplicate"),
        (["json", "0.png.gz"], 1, "image_format"),
        (["html"], 0, "no json"),
    ],
)
def test_foreign_members(
    write_unchecked: Callable[..., Path],
    tmp_path: Path,
    extensions: list[str],
    num_images: int,
    reason: str,
) -> None:
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    members = [(name, record_json(1) if name == "json" else payload) for name in extensions]
    reader = open_reader(write_unchecked((members, num_images)))
    with pytest.raises(BadSample, match=reason):
        reader.read(0)
    assert not marker.exists()


def test_hidden_sample_is_refused(write_unchecked: Callable[..., Path]) -> None:
    # webdataset skips __meta__/*: it yields nothing, and no StopIteration may leak
    reader = open_reader(write_unchecked(([("json", record_json(0))], 0), key="__meta__"))
    with pytest.raises(BadSample, match="holds 0 samples"):
        reader.read(0)


def with_range(index: ShardIndex, data: bytes) -> ShardIndex:
    """The index with sample 0 being all of its shard's bytes, which become `data`."""
    records = np.array(index.records)
    records["offset"][0], records["length"][0] = 0, len(data)
    records["crc32"][0] = zlib.crc32(data)
    (index.directory / "shard-000000.tar").write_bytes(data)
    return dataclasses.replace(index, records=records)


def test_compressed_range_is_not_unpacked(shards: Path) -> None:
    index = ShardIndex.load(shards)
    sample = (shards / "shard-000000.tar").read_bytes()[: int(index.records["length"][0])]
    assert ShardReader(with_range(index, sample)).read(0).key == "unit/000000000"
    with pytest.raises(BadSample, match="plain tar header"):
        ShardReader(with_range(index, gzip.compress(sample))).read(0)


def test_range_over_two_samples_is_refused(shards: Path) -> None:
    index = ShardIndex.load(shards)
    both = (shards / "shard-000000.tar").read_bytes()[: int(index.records["length"][:2].sum())]
    with pytest.raises(BadSample, match="holds 2 samples"):
        ShardReader(with_range(index, both)).read(0)


def test_reader_after_fork_and_pickle(built: Path) -> None:
    reader = open_reader(built)
    first = reader.read(0).answers
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._files and copy.read(0).answers == first
    inherited = dict(reader._files)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:  # nothing may escape into pytest
        answers = [reader.read(number).answers[0] for number in (0, 9, 22)]
        os.write(send, json.dumps([answers, reader._process == os.getpid()]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    answers, has_own_files = json.loads(os.read(receive, 1000))
    os.close(receive)
    os.close(send)
    assert answers == ["answer 000", "answer 009", "answer 022"] and has_own_files
    assert dict(reader._files) == inherited and reader.read(1).answers == ["answer 001"]


def test_open_files_are_bounded(
    write_unchecked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    assert MAX_OPEN_SHARDS < 1024
    monkeypatch.setattr("genrecal_ds.data.reader.MAX_OPEN_SHARDS", 2)
    reader = open_reader(shards)
    for number in (0, 8, 16, 0, 22):
        reader.read(number)
        assert len(reader._files) <= 2
        assert 1 <= open_shards_under(shards) <= 2
    reader.close()
    assert open_shards_under(shards) == 0


def open_shards_under(folder: Path) -> int:
    """Count the tars of one folder that this process has open."""
    open_files = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
            path = descriptor.readlink()
            open_files += path.suffix == ".tar" and path.is_relative_to(folder.resolve())
    return open_files
