"""Third-party shards: what is in them is read right, or the shard is refused and nothing runs."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.build import main
from data_tools.builder import build as build_shards
from data_tools.sources import RawSample, Rejected, Rows, Source, webdataset
from data_tools.sources.items import CAPTION_QUESTION
from data_tools.sources.webdataset import open_source
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.reader import ShardReader
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

Reasons = Callable[[Source], list[str]]
Members = list[tuple[str, bytes]]


def write(path: Path, members: Members, **headers: Any) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in headers.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def conversation(question: str) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]
    return json.dumps({"id": "own", "conversations": turns}).encode()


def test_golden(tmp_path: Path, png: Callable[..., bytes], reasons: Reasons) -> None:
    members = [
        ("000/a.jpg", png(1, "JPEG")), ("000/a.txt", b" a caption \n"),
        ("000/b.json", conversation("<image> one <image> two")),
        ("000/b.img10.PNG", png(10)), ("000/b.img2.png", png(2)),
        ("000/c.json", json.dumps({"question": "q?", "answer": "yes"}).encode()),
        ("000/d.webp", png(3, "WEBP")),
    ]  # fmt: skip
    source = open_source(str(write(tmp_path / "x.tar", members)))
    assert reasons(source) == ["000/a", "own", "000/c", "members"]
    a, b, c, _ = source.rows(0, 4)
    assert isinstance(a, RawSample) and isinstance(b, RawSample) and isinstance(c, RawSample)
    assert a.images == [("jpg", png(1, "JPEG"))]
    assert a.messages[0]["content"][1]["text"] == CAPTION_QUESTION
    assert a.messages[1]["content"][0]["text"] == "a caption"
    assert b.images == [("png", png(2)), ("png", png(10))], "2 comes before 10"
    assert (c.images, c.answers) == ([], ["yes"])


def test_img2dataset_layout_is_a_caption(tmp_path: Path, png: Callable[..., bytes]) -> None:
    facts = json.dumps({"url": "https://x.org/1.jpg", "caption": "a cat", "sha256": "0"}).encode()
    members = [("0001.jpg", png(1, "JPEG")), ("0001.json", facts), ("0001.txt", b"a cat")]
    (row,) = open_source(str(write(tmp_path / "x.tar", members))).rows(0, 1)
    assert isinstance(row, RawSample) and row.source_id == "0001"
    assert row.messages[1]["content"][0]["text"] == "a cat"


def test_our_own_shards_come_back(tmp_path: Path, png: Callable[..., bytes]) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    sample = RawSample([("png", png(1))], messages, "kind", ["a"], "id")
    build_shards(Rows("s", [sample]), tmp_path / "one", arguments={})
    command = [str(tmp_path / "one"), "--format", "webdataset", "--out", str(tmp_path / "two")]
    assert main(command) == 0
    reader = ShardReader(ShardIndex.load(tmp_path / "two"))
    read = reader.read(0)
    assert (read.messages, read.kind, read.answers, read.source_id) == (
        messages, "kind", ["a"], "id",
    )  # fmt: skip


class Payload:
    """Unpickling it would create the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "extension",
    ["pyd", "pickle", "pkl", "PYD", "Pickle", "x.pkl", "pyd.gz", "pkl.gz", "npy", "pth", "pt",
     "ten", "mp", "cbor", "json.gz", "jpg.pyd", "cls", ""],
)  # fmt: skip
def test_foreign_members_are_counted_and_never_opened(
    tmp_path: Path, png: Callable[..., bytes], extension: str
) -> None:
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    data = gzip.compress(payload) if extension.endswith("gz") else payload
    name = f"a.{extension}" if extension else "a"
    members = [("a.png", png(1)), ("a.txt", b"it"), (name, data), ("._a.png", data)]
    path = write(tmp_path / "x.tar", members)
    (row,) = open_source(str(path)).rows(0, 1)
    assert isinstance(row, RawSample)
    assert row.unread == [f".{extension.lower()}", "dot files"]
    assert main([str(path), "--format", "webdataset", "--out", str(tmp_path / "out")]) == 0
    assert len(ShardIndex.load(tmp_path / "out")) == 1 and not marker.exists()


@pytest.mark.parametrize("extension", ["pyd.jpg", "seg.png", "meta.json", "x.txt", "mp4"])
def test_members_that_look_like_content_end_the_build(
    tmp_path: Path, png: Callable[..., bytes], extension: str
) -> None:
    members = [("a.png", png(1)), ("a.txt", b"it"), (f"a.{extension}", b"x")]
    path = write(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"x\.tar: 'a.*looks like content.* --ignore " + extension):
        open_source(str(path))
    (row,) = open_source(str(path), ignore=[extension]).rows(0, 1)
    assert isinstance(row, RawSample) and row.unread == [f".{extension}"]


@pytest.mark.parametrize("name", ["../../a.png", "/etc/a.png", "x/../../a.png", "a\\b.png"])
def test_names_that_lead_out(tmp_path: Path, png: Callable[..., bytes], name: str) -> None:
    path = write(tmp_path / "x.tar", [(name, png(1))])
    with pytest.raises(UserError, match="leads out of the shard"):
        open_source(str(path))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    path = write(tmp_path / "x.tar", [("a.png", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(UserError, match="sparse, a link or a device"):
        open_source(str(path))


def test_keys_in_two_places_and_members_twice(tmp_path: Path, png: Callable[..., bytes]) -> None:
    one, two = ("a.png", png(1)), ("b.png", png(2))
    path = write(tmp_path / "x.tar", [one, two, ("a.json", b"{}"), ("b.json", b"{}")])
    with pytest.raises(UserError, match=r"a\.json': key 'a' is in two places"):
        open_source(str(path))
    path = write(tmp_path / "y.tar", [one, one])
    with pytest.raises(UserError, match="comes twice"):
        open_source(str(path))
    path = write(tmp_path / "z.tar", [("a.v1.png", png(1)), ("a.v2.png", png(2))])
    assert len(open_source(str(path))) == 1, "a key ends at the first dot, as in webdataset"


def test_every_cut_and_every_damaged_header_is_found(
    tmp_path: Path, png: Callable[..., bytes]
) -> None:
    """Where webdataset ends in silence."""
    members = [(f"{number}.{end}", png(1) if end == "png" else conversation("<image> q"))
               for number in range(3) for end in ("png", "json")]  # fmt: skip
    path = write(tmp_path / "x.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
        end = offsets[-1] + 1024
    for size in (*offsets[1:], offsets[2] + 100, offsets[3] + 600, end, end + 512):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut off|not a plain tar"):
            open_source(str(path))
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset + 150] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cut off|not a plain tar"):
            open_source(str(path))
    for data in (b"", b"<html>", gzip.compress(whole), bytes(10240)[:100]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a plain tar|cut off"):
            open_source(str(path))
    for data in (whole + whole.replace(b"0.png", b"9.png"), whole + b"x"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="continued at byte"):
            open_source(str(path))


def test_hostile_headers(tmp_path: Path, png: Callable[..., bytes]) -> None:
    sparse = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "10"}
    path = write(tmp_path / "sparse.tar", [("a.png", png(1))], pax_headers=sparse)
    with pytest.raises(UserError, match="'a.png' is sparse"):
        open_source(str(path))
    path = write(tmp_path / "lines.tar", [("a\nb.png", b""), ("c.png", b""), ("a\nb.txt", b"")])
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value), "a message is one line"
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 4
    block = long.tobuf(tarfile.GNU_FORMAT) + b"abc\0".ljust(tarfile.BLOCKSIZE, b"\0")
    path = tmp_path / "long.tar"
    path.write_bytes(block * 3000 + bytes(1024))
    with pytest.raises(UserError, match="not a plain tar"):
        open_source(str(path))
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (2**96 - 512).to_bytes(12, "big")  # a size of -512 would lead in a circle
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(UserError, match="a size of -512"):
        open_source(str(path))


def test_only_regular_files_are_opened(tmp_path: Path, png: Callable[..., bytes]) -> None:
    path = write(tmp_path / "x.tar", [("a.png", png(1)), ("a.txt", b"one")])
    for name, make in (
        ("link.tar", lambda link: link.symlink_to(path)),
        ("fifo.tar", os.mkfifo),  # opening it to read would block for ever
        ("folder.tar", Path.mkdir),
    ):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        make(folder / name)
        with pytest.raises(UserError, match=rf"{name}: .*shards are files"):
            open_source(str(folder))
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match="shorter than when it was opened"):
        list(source.rows(0, 1))


def test_size_caps_come_before_reading(
    tmp_path: Path, png: Callable[..., bytes], reasons: Reasons, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.tar", [("a.png", png(1)), ("a.txt", b"one")])
    source = open_source(str(path))
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", 20)
    monkeypatch.setattr(webdataset, "_open", lambda path: pytest.fail("opened"))
    assert reasons(source) == ["member_bytes"]


def test_folder_and_digest(tmp_path: Path, png: Callable[..., bytes], reasons: Reasons) -> None:
    write(tmp_path / "b.tar", [("2.png", png(2)), ("2.txt", b"two")])
    write(tmp_path / "a.tar", [("1.png", png(1)), ("1.txt", b"one")])
    source = open_source(str(tmp_path))
    assert reasons(source) == ["1", "2"]
    write(tmp_path / "a.tar", [("1.png", png(1)), ("1.txt", b"ONE")])
    assert open_source(str(tmp_path)).digest != source.digest
    (tmp_path / "c.tar").symlink_to(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"c\.tar"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match=r"lacks any \.tar"):
        open_source(str(tmp_path / "nowhere"))


def test_the_names_in_the_json_decide_the_order(tmp_path: Path, png: Callable[..., bytes]) -> None:
    turns = {"conversations": [{"from": "human", "value": "<image><image>"},
                               {"from": "gpt", "value": "a"}]}  # fmt: skip
    pictures = [("k.0.png", png(1)), ("k.1.png", png(2))]
    for names, order in (
        (["k.1.png", "k.0.png"], [2, 1]), (["x/1.png", "x/0.png"], [2, 1]),
        (["left.png", "right.png"], [1, 2]), (None, [1, 2]), (["k.1.png", "left.png"], []),
        (["left.png"], []),
    ):  # fmt: skip
        record = json.dumps({**turns, "images": names}).encode()
        path = write(tmp_path / "x.tar", [*pictures, ("k.json", record)])
        (row,) = open_source(str(path)).rows(0, 1)
        if order:
            assert isinstance(row, RawSample)
            assert row.images == [("png", png(number)) for number in order]
        else:
            assert isinstance(row, Rejected) and row.reason == "image_count"
            assert "the json names" in row.detail and row.source_id == "k"


def test_captions_and_facts_of_other_peoples_shards(
    tmp_path: Path, png: Callable[..., bytes], reasons: Reasons
) -> None:
    facts = b'{"url": "u", "caption": "a cat", "similarity": NaN, "status": "ok", "kind": "x"}'
    members = [
        ("0.jpg", png(1, "JPEG")), ("0.json", facts), ("0.txt", b"\xef\xbb\xbfa cat\r\n"),
        ("1.gif", png(2, "GIF")), ("1.json", facts),
        ("2.png", png(3)), ("2.txt", b"nan"), ("3.png", png(3)), ("3.txt", "\u200b".encode()),
        ("4.png", png(3)), ("4.cls", b"7"), ("README", b"hello"), (".DS_Store", b"x"),
    ]  # fmt: skip
    source = open_source(str(write(tmp_path / "x.tar", members)))
    assert reasons(source) == ["0", "1", "empty_answer", "empty_answer", "members"]
    zero, one, *_ = source.rows(0, 5)
    assert isinstance(zero, RawSample) and isinstance(one, RawSample)
    for row in (zero, one):
        assert row.messages[1]["content"][0]["text"] == "a cat" and row.read == ["caption"]
    assert zero.blank == ["caption"] and zero.unread == ["status", ".", "dot files"]
    assert zero.kind == "webdataset" and one.images[0][0] == "png"
    other = facts.replace(b"a cat", b"a dog")
    path = write(tmp_path / "y.tar", [("0.png", png(1)), ("0.json", other), ("0.txt", b"a cat")])
    with pytest.raises(UserError, match="'json caption' looks like content"):
        list(open_source(str(path)).rows(0, 1))


def test_shards_behind_links_of_a_hubs_cache(tmp_path: Path, png: Callable[..., bytes]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    write(blobs / "f00d", [("a.png", png(1)), ("a.txt", b"one")])
    (snapshot / "train-0.tar").symlink_to("../blobs/f00d")
    with pytest.raises(UserError, match="--allow-links names the folder"):
        open_source(str(snapshot))
    (row,) = open_source(str(snapshot), links=str(blobs)).rows(0, 1)
    assert isinstance(row, RawSample) and row.source_id == "a"
