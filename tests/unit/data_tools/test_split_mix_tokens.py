"""split, mix, tokens, fingerprint and the contact sheet, each on real shards."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data_tools.build import main as build_main
from data_tools.builder import build
from data_tools.fingerprint import main as fingerprint
from data_tools.inspect import main as inspect
from data_tools.mix import main as mix
from data_tools.mix import repeats
from data_tools.sources import RawSample, Rows
from data_tools.split import Groups, choose
from data_tools.split import main as split
from data_tools.tokens import main as tokens
from data_tools.verify import main as verify
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.lengths import TABLE_DTYPE, estimated, measured
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit
Raw = Callable[[int, int], RawSample]


def keys(folder: Path) -> list[str]:
    reader = ShardReader(ShardIndex.load(folder))
    return [reader.read(number).key for number in range(len(reader))]


def test_split_keeps_samples_whole_and_pictures_apart(
    raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # three samples a picture; every tenth sample joins the pictures of two groups
    samples = []
    for number in range(300):
        sample = raw(number // 3, 1)
        if number % 10 == 0:
            sample = dataclasses.replace(raw(number // 3, 2), images=[
                raw(number // 3, 1).images[0], raw(number // 3 + 1, 1).images[0]])  # fmt: skip
        samples.append(dataclasses.replace(sample, source_id=str(number)))
    build(Rows("s", samples), tmp_path / "all", arguments={}, shard_size=64)
    command = [str(tmp_path / "all"), "train=0.8", "val=0.2", "--shard-size", "50"]
    assert split([*command, "--out", str(tmp_path / "out")]) == 0
    parts = {
        name: ShardReader(ShardIndex.load(tmp_path / "out" / name)) for name in ("train", "val")
    }
    pictures, found = {}, Counter[str]()
    for name, reader in parts.items():
        members = [reader.members(number) for number in range(len(reader))]
        pictures[name] = {data for m in members for key, data in m.items() if key != "json"}
        found.update(json.loads(m["json"])["source_id"] for m in members)
    assert not pictures["train"] & pictures["val"]
    assert found == Counter(str(number) for number in range(300)), "every sample, once"
    assert 0.1 < len(parts["val"]) / 300 < 0.35
    assert verify([str(tmp_path / "out/train")]) == 0
    assert split([*command, "--out", str(tmp_path / "again")]) == 0
    for name in parts:
        one, two = (tmp_path / place / name / "index.npy" for place in ("out", "again"))
        assert one.read_bytes() == two.read_bytes()
    assert split([*command, "--out", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    for words in (
        ["train=1"],
        ["train=1", "train=2"],
        ["a=0", "b=1"],
        ["../a=1", "b=1"],
        ["a", "b"],
    ):
        assert split([str(tmp_path / "all"), *words, "--out", str(tmp_path / "x")]) == 2


def test_split_refuses_damaged_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"question 010", b"question 011"))
    assert split([str(shards), "a=1", "b=1", "--out", str(tmp_path / "out")]) == 1
    assert "crc32" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_groups_join_in_any_order() -> None:
    pairs = [[b"b", b"a"], [b"c", b"d"], [b"b", b"c"], [b"z", b"y"]]
    for order in (pairs, pairs[::-1], [pair[::-1] for pair in pairs]):
        groups = Groups()
        for pair in order:
            groups.join(pair)
        assert {groups.find(name) for name in (b"a", b"b", b"c", b"d")} == {b"a"}
        assert groups.find(b"z") == b"y"


def test_choose_follows_the_shares() -> None:
    shares = {"a": 1.0, "b": 3.0}
    found = Counter(choose(str(i).encode(), shares, seed=0) for i in range(4000))
    assert 0.22 < found["a"] / 4000 < 0.28
    other = Counter(choose(str(i).encode(), shares, seed=0) == choose(str(i).encode(), shares, 1)
                    for i in range(4000))  # fmt: skip
    assert other[False] > 1000


def test_mix_repeats_by_weight(
    built: Path, raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(Rows("second", [raw(n, 1) for n in range(40)]), tmp_path / "b", arguments={})
    out = tmp_path / "mix"
    assert mix([f"{built}=2.5", f"{tmp_path / 'b'}=0.25", "--out", str(out)]) == 0
    found = Counter(keys(out))
    first = [count for key, count in found.items() if key.startswith("unit/")]
    second = [count for key, count in found.items() if key.startswith("second/")]
    assert len(first) == 23 and Counter(first) == {2: 11, 3: 12}
    assert second == [1] * 10
    index = ShardIndex.load(out)
    assert index.kinds == ("text", "one", "many") and len(index.shards) == 4
    assert Counter(index.kinds[code] for code in index.records["kind"])["one"] > 10
    assert verify([str(out)]) == 0
    paths = [str(path) for path in sorted(out.glob("*.tar"))]
    assert len(list(wds.WebDataset(paths, shardshuffle=False))) == 63
    assert (out / "shard-000000.tar").samefile(built / "shard-000000.tar")
    again = tmp_path / "again"
    assert mix([f"{built}=2.5", f"{tmp_path / 'b'}=0.25", "--out", str(again)]) == 0
    assert (again / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()
    capsys.readouterr()
    for words, message in (
        ([f"{built}"], "write FOLDER=WEIGHT"),
        ([f"{built}=0"], "write FOLDER=WEIGHT"),
        ([f"{built}=1", f"{built}=2"], "named twice"),
        ([f"{built}=0.001"], "leave no sample"),
        (["pipe:true=1"], "local folder only"),
    ):
        assert mix([*words, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    assert mix([f"{built}=1", "--out", str(out)]) == 2


def test_mix_copies_where_it_cannot_link(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert mix([f"{built}=1", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/shard-000000.tar").samefile(built / "shard-000000.tar")
    assert keys(tmp_path / "out") == keys(built)


def test_repeats() -> None:
    assert repeats(10, 2.0, 0).tolist() == [2] * 10
    counts = repeats(1000, 1.3, 0)
    assert counts.sum() == 1300 and set(counts) == {1, 2}
    assert not np.array_equal(counts, repeats(1000, 1.3, 1))


def test_fingerprint(
    built: Path, raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = Rows("unit", [raw(n, n % 3) for n in range(23)])
    build(samples, tmp_path / "larger", arguments={}, shard_size=23)
    build(Rows("unit", samples.samples[:22]), tmp_path / "fewer", arguments={}, shard_size=23)
    assert fingerprint([str(built), str(tmp_path / "larger")]) == 0
    out = capsys.readouterr().out
    prints = re.findall(r"fingerprint (\w{64})", out)
    contents = re.findall(r"content     (\w{64})", out)
    assert len(set(prints)) == 2 and len(set(contents)) == 1, "sizes of shards do not matter"
    assert ShardIndex.load(built).fingerprint in prints
    assert fingerprint([str(built), str(tmp_path / "fewer")]) == 1
    assert fingerprint([str(tmp_path / "nowhere")]) == 2


class Tags(HTMLParser):
    """All tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_contact_sheet_shows_hostile_text_as_text(raw: Raw, tmp_path: Path) -> None:
    hostile = (
        '<script>alert(1)</script>"><img src=//x onerror=y>\x1b]0;owned\x07 \u202etxt {{ 7*7 }}'
    )
    sample = dataclasses.replace(raw(7, 2), kind=hostile, answers=[hostile], source_id=hostile)
    for message in sample.messages:
        message["content"][-1]["text"] = hostile
    folder = tmp_path / "shards"
    build(Rows("s", [sample, raw(1, 0), raw(2, 1)]), folder, arguments={})
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"question 001", b"question 002"))
    out = tmp_path / "sheet.html"
    assert inspect([str(folder), "--html", str(out), "--count", "9"]) == 0
    page = out.read_text()
    parsed = Tags(page)
    names = Counter(name for name, _ in parsed.tags)
    assert names["article"] == 3 and names["img"] == 3 and not names["script"]
    assert all(a["src"].startswith("data:image/jpeg;base64,") for name, a in parsed.tags
               if name == "img" and a["src"])  # fmt: skip
    assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert "default-src 'none'; img-src data:" in page and "http" not in page.replace("http-eq", "")
    assert parsed.text.count("<script>alert(1)</script>") == 4, "two turns, kind and answers"
    assert r"\x1b]0;owned\x07" in parsed.text and "{{ 7*7 }}" in parsed.text
    assert not set(page) & {"\x1b", "\x07", "\u202e"}
    assert "crc32" in parsed.text, "a damaged sample shows its reason"


def test_names_of_files_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x\x1b]0;owned\x07<script>"
    folder.mkdir()
    (folder / "a\x1b[2J.tar").write_bytes(b"x")
    out = str(tmp_path / "out")
    for code in (
        build_main([str(folder), "--format", "webdataset", "--out", out]),
        build_main([str(folder), "--format", "llava", "--out", out]),
        verify([str(folder)]), inspect([str(folder)]), fingerprint([str(folder)]),
        split([str(folder), "a=1", "b=1", "--out", out]), mix([f"{folder}=1", "--out", out]),
        tokens([str(folder), "--student", str(folder)]),
    ):  # fmt: skip
        assert code == 2
    printed = "".join(capsys.readouterr())
    assert printed.count("<script>") >= 8 and not set(printed) & {"\x1b", "\x07"}


def test_tokens_table_of_a_pair(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from genrecal_ds.models.chat import ChatEncoder
    from tests.fixtures import build_digit_shards

    folder = build_digit_shards(tmp_path / "shards", "train", 60)
    models = {"teacher": pair / "teacher_init", "student": pair / "student_init"}
    encoders = {side: ChatEncoder(path, 1000) for side, path in models.items()}
    digests = {side: encoder.digest for side, encoder in encoders.items()}
    index = ShardIndex.load(folder)
    with pytest.raises(UserError, match=r"python -m data_tools\.tokens .* --teacher FOLDER"):
        measured(index, digests, {"teacher": 1000, "student": 1000})
    options = [f"--{side}={path}" for side, path in models.items()]
    assert tokens([str(folder), *options, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "teacher, visual" in out and "data.lengths=measured" in out
    (path,) = folder.glob("tokens-*.npy")
    table = np.load(path)
    assert table.dtype == TABLE_DTYPE and path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    reader = ShardReader(index)
    for number in (0, 17, 59):
        sample = reader.read(number)
        for side, encoder in encoders.items():
            chat = encoder.encode(sample.messages, sample.images)
            assert table[side][number] == len(chat.input_ids_T)
            has_picture = bool(sample.images)
            assert (table[f"{side}_visual"][number] > 0) == has_picture
    both = measured(index, digests, {"teacher": 1000, "student": 1000})
    np.testing.assert_array_equal(both.values, table["teacher"].astype(int) + table["student"])
    short = measured(index, digests, {"student": 20})
    np.testing.assert_array_equal(short.values, np.minimum(table["student"], 20))
    assert len({both.digest, short.digest, estimated(index).digest}) == 3
    with pytest.raises(UserError, match="no table of this pair's token counts"):
        measured(index, {**digests, "student": "another"}, {"student": 20})
    np.save(path, table[::-1])
    with pytest.raises(UserError, match="sha256 is .* make the table again"):
        measured(index, digests, {"student": 20})


def test_members_and_tar_bytes(built: Path, shards: Path) -> None:
    reader = ShardReader(ShardIndex.load(built))
    assert reader.members(2).keys() == {"json", "0.png", "1.png"}
    data = b"".join(reader.tar_bytes(number) for number in range(8))
    assert (built / "shard-000000.tar").read_bytes().startswith(data)
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"question 001", b"question 002"))
    damaged = ShardReader(ShardIndex.load(shards))
    for read in (damaged.members, damaged.tar_bytes):
        with pytest.raises(BadSample, match="sample 1, key unit/000000001: crc32"):
            read(1)
