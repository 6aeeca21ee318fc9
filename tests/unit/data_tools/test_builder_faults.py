"""The fault cases that concern data, one test each, numbered as in the project's list of faults.

Substitute: the sample is left out, counted and named, and the batch keeps its shape. Stop: one
UserError. Nothing from data is ever executed: a marker file would show it.
"""

import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.build import main as build_main
from data_tools.builder import build
from data_tools.sources import RawSample, Rows
from data_tools.verify import main as verify
from genrecal_ds.data import loader as loader_module
from genrecal_ds.data.decode import MAX_PIXELS, SampleError, decode_image, decode_record
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairDataset, PairEncoders, micro_batches
from genrecal_ds.data.pair import EncodedChat, Unusable
from genrecal_ds.data.plan import Order, StepPlan
from genrecal_ds.data.reader import BadSample, ShardReader
from genrecal_ds.data.store import ShardStore
from genrecal_ds.errors import UserError
from genrecal_ds.training.guards.counts import MIN_SEEN, MIN_UNREADABLE, SampleCounts
from tests.fixtures import ROOT

pytestmark = pytest.mark.unit
Raw = Callable[[int, int], RawSample]


class Letters:
    """One token a character, 0 ends an answer; a picture is one more."""

    max_length = 1000
    reads_images = True
    vision_rules = {"pixels": "rows"}
    digest = "letters"

    def rewrites(self, messages: list) -> bool:
        return False

    def encode(self, messages: list, images: list, last_turn: bool = False) -> EncodedChat:
        ids, answers = [], []
        for message in messages:
            start = len(ids)
            ids += [ord(letter) for letter in message["content"][-1]["text"]]
            if message["role"] == "assistant":
                ids.append(0)
                answers.append((start, len(ids)))
        vision = {"pixels": torch.ones(len(images), 1)} if images else {}
        return EncodedChat(torch.tensor(ids), tuple(answers), {}, vision)


def dataset_of(index: ShardIndex, encoder: Any = None) -> PairDataset:
    encoder = encoder or Letters()
    return PairDataset(index, PairEncoders(encoder, encoder), with_regular=True)


def plan_of(index: ShardIndex, global_batch: int = 8, window: int = 50) -> StepPlan:
    return StepPlan(Order(index.classes, index.costs(), "", 0, global_batch, window))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_case_01_truncated_shard_stops_the_start(shards: Path) -> None:
    path = shards / "shard-000001.tar"
    offset = int(ShardIndex.load(shards).records["offset"][11])
    size = path.stat().st_size
    os.truncate(path, offset)
    with pytest.raises(UserError, match=rf"{path}: expected {size} bytes, actual {offset}"):
        ShardIndex.load(shards)


@pytest.mark.parametrize("where", ["header", "picture"])
def test_case_02_flipped_bit_is_substituted(
    shards: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ShardIndex.load(shards)
    offset = int(index.records["offset"][10])
    data = (shards / "shard-000001.tar").read_bytes()
    place = offset + 100 if where == "header" else data.index(b"IDAT", offset) + 6
    flip(shards / "shard-000001.tar", place)
    batch = dataset_of(index)[(9, 10, 11)]
    assert batch.num_samples == 2 and batch.sample_ids == (9, 10, 11)
    assert len(batch.unreadable) == 1 and "sample 10, key unit/000000010" in batch.unreadable[0]
    assert verify([str(shards)]) == 1
    assert "sample 10, key unit/000000010: crc32" in capsys.readouterr().out


def test_case_03_missing_extra_or_changed_shard_stops_the_start(shards: Path) -> None:
    extra = shards / "shard-000009.tar"
    extra.write_bytes(b"x")
    with pytest.raises(UserError, match=r"shard-000009\.tar: not in the manifest"):
        ShardIndex.load(shards)
    extra.unlink()
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"shard-000001\.tar: expected"):
        ShardIndex.load(shards)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: missing"):
        ShardIndex.load(shards)


def test_case_04_replaced_data_has_another_fingerprint(shards: Path, built: Path, raw: Raw) -> None:
    """Training stops on it, or goes on with resume=new_data: tests/dist/test_data.py."""
    samples = Rows("unit", [raw(number + 1, number % 3) for number in range(23)])
    for path in list(shards.iterdir()):
        path.unlink()
    build(samples, shards, arguments={"seed": 0}, shard_size=8)
    assert ShardIndex.load(shards).fingerprint != ShardIndex.load(built).fingerprint
    reload, (_, fingerprint) = ShardIndex.load(built).__reduce__()
    with pytest.raises(UserError, match="the shards changed while in use"):  # in a worker
        reload(ShardStore(str(shards)), fingerprint)


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def with_picture(raw: Raw, data: bytes, extension: str = "jpg") -> RawSample:
    sample = raw(0, 1)
    return RawSample([(extension, data)], sample.messages, sample.kind, [], "")


@pytest.mark.parametrize("data", [jpeg()[:-400], jpeg()[:300], b"\xff\xd8\xff" + bytes(90), b""])
def test_case_05_damaged_jpeg_is_rejected_at_build_and_substituted_later(
    raw: Raw, tmp_path: Path, write_unchecked: Callable[..., Path], data: bytes
) -> None:
    samples = Rows("s", [raw(0, 1), with_picture(raw, data)])
    report = build(samples, tmp_path / "out", arguments={}, max_reject_rate=1)
    assert set(report.rejected) <= {"image_decode", "image_format"} and report.num_rejected == 1
    record = ShardReader(ShardIndex.load(tmp_path / "out")).members(0)["json"]
    folder = write_unchecked(([("json", record), ("0.jpg", data)], 1))
    batch = dataset_of(ShardIndex.load(folder))[(0,)]
    assert batch.num_samples == 0 and "image_" in batch.unreadable[0]
    assert batch.student.inputs.vision["pixels"].shape[0] == 1, "the vision tower still runs"


def test_case_06_bomb_is_refused_from_its_header(raw: Raw, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG", optimize=True)
    bomb = buffer.getvalue()
    assert len(bomb) < 40_000 and 12_000**2 > MAX_PIXELS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SampleError, match="image_pixels: 12000x12000"):
        decode_image(bomb, "png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    samples = Rows("s", [raw(0, 1), with_picture(raw, bomb, "png")])
    report = build(samples, tmp_path / "out", arguments={}, max_reject_rate=1)
    assert report.rejected == {"image_pixels": 1}


def odd_pictures() -> Iterator[tuple[str, bytes, str, Any]]:
    """(name, bytes, extension, expected size and first pixel, or the reason)."""

    def save(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    yield "rotated", save(Image.new("RGB", (40, 20), "red"), "PNG", exif=exif), "png", (
        (20, 40), (255, 0, 0))  # fmt: skip
    yield "cmyk", save(Image.new("CMYK", (3, 3)), "JPEG"), "jpg", ((3, 3), (255, 255, 255))
    deep = Image.fromarray(np.full((2, 2), 40_000, np.uint16))
    yield "16 bit", save(deep, "PNG"), "png", ((2, 2), (156, 156, 156))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    yield "palette", save(palette, "PNG"), "png", ((2, 2), (10, 20, 30))
    yield "palette and alpha", save(palette, "PNG", transparency=0), "png", (
        (2, 2), (255, 255, 255))  # fmt: skip
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    yield "alpha", save(clear, "PNG"), "png", ((2, 2), (255, 255, 255))
    red, blue = (Image.new("RGB", (4, 4), name) for name in ("red", "blue"))
    movie = save(red, "WEBP", save_all=True, append_images=[blue], lossless=True)
    yield "animation", movie, "webp", ((4, 4), (255, 0, 0))
    gif = save(red, "GIF", save_all=True, append_images=[blue])
    yield "gif", gif, "gif", "image_format"
    yield "one pixel", save(Image.new("RGB", (1, 1), "red"), "PNG"), "png", ((1, 1), (255, 0, 0))
    yield "long", save(Image.new("RGB", (1, 20_000)), "PNG"), "png", "image_aspect"
    yield "just not long", save(Image.new("RGB", (200, 1)), "PNG"), "png", ((200, 1), (0, 0, 0))


@pytest.mark.parametrize("case", list(odd_pictures()), ids=lambda case: case[0])
def test_case_07_odd_pictures_have_one_defined_result(case: tuple[str, bytes, str, Any]) -> None:
    _, data, extension, expected = case
    if isinstance(expected, str):
        with pytest.raises(SampleError) as caught:
            decode_image(data, extension)
        assert caught.value.reason == expected
        return
    image = decode_image(data, extension)
    assert image.mode == "RGB" and (image.size, image.getpixel((0, 0))) == expected


def test_case_08_incomplete_samples(
    raw: Raw, tmp_path: Path, write_unchecked: Callable[..., Path], built: Path
) -> None:
    sample = raw(0, 1)
    for images in ([], sample.images * 2):
        broken = RawSample(images, sample.messages, "k", [], "")
        report = build(
            Rows("s", [sample, broken]), tmp_path / str(len(images)), arguments={},
            max_reject_rate=1,
        )  # fmt: skip
        assert report.rejected == {"image_count": 1}
    members = ShardReader(ShardIndex.load(built)).members(1)
    json_member, picture = ("json", members["json"]), ("0.png", members["0.png"])
    folder = write_unchecked(([picture], 1), ([json_member], 1), ([json_member, picture], 2))
    batch = dataset_of(ShardIndex.load(folder))[(0, 1, 2)]
    assert batch.num_samples == 0 and len(batch.unreadable) == 3


GOOD = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ],
    "kind": "k", "answers": [], "source": "s", "source_id": "",
}  # fmt: skip


def record(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


BAD_RECORDS = {
    "bom": (b"\xef\xbb\xbf" + record(), "record_json"),
    "utf-16": (record().decode().encode("utf-16"), "text_encoding"),
    "nan": (record().replace(b'"k"', b"NaN"), "record_json"),
    "duplicate key": (record().replace(b'"kind"', b'"source"'), "record_json"),
    "lone surrogate": (record().replace(b'"q"', b'"\\ud800"'), "text_encoding"),
    "brackets": (b"[" * 10**6, "record_depth"),
    "number": (record().replace(b'"q"', b"7"), "string"),
    "wrong type": (b'"text"', "record_keys"),
    "empty": (record(messages=[]), "messages"),
    "no assistant": (record(messages=GOOD["messages"][:1]), "no_assistant"),
    "last human": (record(messages=[*GOOD["messages"], GOOD["messages"][0]]), "last_turn"),
    "empty answer": (
        record(messages=[GOOD["messages"][0],
                         {"role": "assistant", "content": [{"type": "text", "text": " "}]}]),
        "empty_answer",
    ),
    "huge integer": (record().replace(b'"k"', b"1" * 5000), "record_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_case_09_bad_json_has_its_reason_and_the_build_goes_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, reason = BAD_RECORDS[name]
    with pytest.raises(SampleError) as caught:
        decode_record(data)
    assert caught.value.reason == reason
    good = {"id": 1, "conversations": [{"from": "human", "value": "q"},
                                       {"from": "gpt", "value": "a"}]}  # fmt: skip
    lines = [json.dumps(good).encode()] * 20 + [data.replace(b"\n", b" ")]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    command = [str(tmp_path / "x.jsonl"), "--format", "llava", "--workers", "1"]
    if name == "nan":  # in another's file: as its kind, which is then not read
        assert build_main([*command, "--out", str(tmp_path / "read")]) == 0
        assert len(ShardIndex.load(tmp_path / "read")) == 21
        return
    assert build_main([*command, "--out", str(tmp_path / "strict")]) == 1
    assert not (tmp_path / "strict/manifest.json").exists()
    command += ["--max-reject-rate", "0.05", "--out", str(tmp_path / "lax")]
    assert build_main(command) == 0
    assert len(ShardIndex.load(tmp_path / "lax")) == 20


def test_case_10_any_id_is_kept_and_told_apart(raw: Raw, tmp_path: Path) -> None:
    ids = ["same", "same", "a.b.c", "x/y", "../../etc/passwd", "i" * 300, "\u00fcn\u00ef\u4e2d", ""]
    samples = [RawSample(s.images, s.messages, s.kind, s.answers, name)
               for name, s in zip(ids, [raw(n, 1) for n in range(8)], strict=True)]  # fmt: skip
    build(Rows("s", samples), tmp_path / "out", arguments={})
    reader = ShardReader(ShardIndex.load(tmp_path / "out"))
    read = [reader.read(number) for number in range(8)]
    assert [sample.source_id for sample in read] == ids
    assert [sample.key for sample in read] == [f"s/{number:09d}" for number in range(8)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Payload:
    """Unpickling it would create the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["0.pyd", "0.pickle", "0.PKL", "0.pyd.gz", "x.pkl", "0.npy"])
def test_case_11_foreign_members_are_refused_and_nothing_runs(
    name: str, tmp_path: Path, write_unchecked: Callable[..., Path], built: Path
) -> None:
    """Links, devices and interleaved members: sources/test_webdataset.py."""
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    members = ShardReader(ShardIndex.load(built)).members(1)
    folder = write_unchecked(([("json", members["json"]), (name, payload)], 1))
    batch = dataset_of(ShardIndex.load(folder))[(0,)]
    assert batch.num_samples == 0 and len(batch.unreadable) == 1
    verify([str(folder)])
    third_party = tmp_path / "x.tar"
    with tarfile.open(third_party, "w") as tar:
        info = tarfile.TarInfo(f"a.{name}")
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    command = [str(third_party), "--format", "webdataset", "--out", str(tmp_path / "out")]
    assert build_main(command) == 2
    assert not marker.exists()


def test_case_12_urls_and_pipes_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """tests/unit/data/test_store.py has every scheme."""
    marker = tmp_path / "marker"
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {marker}")
    for location in (f"pipe:touch {marker}", f" PIPE:touch {marker}", "http://x/y", "s3://x/y"):
        with pytest.raises(UserError, match="local folder only"):
            ShardIndex.load(location)
        assert build_main([location, "--format", "webdataset", "--out", location]) == 2
    assert not marker.exists()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_case_13_more_ranks_and_workers_than_shards(
    raw: Raw, tmp_path: Path, num_workers: int
) -> None:
    build(Rows("s", [raw(n, n % 2) for n in range(5)]), tmp_path / "one", arguments={})
    index = ShardIndex.load(tmp_path / "one")
    assert len(index.shards) == 1
    ledger: list[int] = []
    for rank in range(8):  # less than one global batch, for eight ranks
        steps = list(micro_batches(
            dataset_of(index), plan_of(index, 8), first_step=0, last_step=1, rank=rank,
            world_size=8, micro_batch=1, num_workers=num_workers,
        ))  # fmt: skip
        assert [len(step) for step in steps] == [1]
        ledger += steps[0][0].sample_ids
    assert sorted(ledger) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="nothing to write"):
        build(Rows("s", []), tmp_path / "none", arguments={})


class TooLongFor(Letters):
    def encode(self, messages: list, images: list, last_turn: bool = False) -> EncodedChat:
        raise Unusable("longer than max_length")


def test_case_14_a_batch_without_labels_is_zero_not_nan(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = dataset_of(ShardIndex.load(built))
    dataset.encoders = PairEncoders(TooLongFor(), TooLongFor())
    batch = dataset[(0, 1)]
    assert batch.unusable == ("longer than max_length",) * 2
    assert (batch.num_teacher_rows, batch.num_student_rows, batch.num_samples) == (0, 0, 0)
    counts = SampleCounts(0.001)
    counts.of([batch])
    counts.of([batch])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "rank 0: left out key unit/000000000: longer than max_length; more are counted only"
    ]
    with pytest.raises(UserError, match=f"none of the first {MIN_SEEN} samples can be used"):
        for _ in range(MIN_SEEN // 2):
            counts.add(counts.of([batch]))


def test_case_15_every_micro_batch_calls_the_same_modules(built: Path) -> None:
    """Two ranks of unlike composition train in tests/dist/test_gradients.py."""
    index = ShardIndex.load(built)
    dataset = dataset_of(index)
    for slots in ((0,), (1,), (2,), (0, 1), (0, 2), (-1,), (0, 3), (-1, -1)):
        batch = dataset[slots]
        assert batch.student.inputs.vision["pixels"].shape[0] >= 1
        assert batch.teacher is not None and batch.teacher.inputs.vision["pixels"].shape[0] >= 1


class Dies(Letters):
    """Worker processes end, or hang, at the sample with `question 010`."""

    def __init__(self, how: str) -> None:
        self.how, self.parent = how, os.getpid()

    def encode(self, messages: list, images: list, last_turn: bool = False) -> EncodedChat:
        if "question 010" in messages[0]["content"][-1]["text"] and os.getpid() != self.parent:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exits":
                os._exit(3)
            if self.how == "hangs":
                time.sleep(60)
            raise StopIteration("a bare next() somewhere")
        return super().encode(messages, images)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["killed", "exits", "hangs", "StopIteration"])
def test_case_16_a_worker_that_fails_is_an_error_and_never_a_short_epoch(
    built: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "WORKER_TIMEOUT_SECONDS", 3)
    index = ShardIndex.load(built)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        list(micro_batches(
            dataset_of(index, Dies(how)), plan_of(index), first_step=0, last_step=3, rank=0,
            world_size=1, micro_batch=2, num_workers=2,
        ))  # fmt: skip
    assert time.monotonic() - start < 30


UNCAUGHT = """
import sys
sys.path[:0] = [{root!r}]
from tests.unit.data_tools.test_builder_faults import Dies, dataset_of, plan_of
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import micro_batches
index = ShardIndex.load({folder!r})
batches = micro_batches(
    dataset_of(index, Dies("hangs")), plan_of(index), first_step=0, last_step=3, rank=0,
    world_size=1, micro_batch=2, num_workers=2,
)
next(batches)
raise AssertionError("a bug in the training loop")
"""


def test_case_16_an_uncaught_error_ends_the_rank_though_a_worker_hangs(built: Path) -> None:
    program = UNCAUGHT.format(root=str(ROOT), folder=str(built))
    done = subprocess.run([sys.executable, "-c", program], timeout=60, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"a bug in the training loop" in done.stderr


def test_case_16_signals_to_workers_are_left_to_the_rank(built: Path) -> None:
    """A SIGTERM to the whole process group must not end a step in the middle."""
    index = ShardIndex.load(built)
    before = set(multiprocessing.active_children())
    run = micro_batches(
        dataset_of(index), plan_of(index), first_step=0, last_step=30, rank=0, world_size=1,
        micro_batch=2, num_workers=2,
    )  # fmt: skip
    first = next(run)
    workers = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid or 0, number)
    assert len(workers) == 2 and len([first, *run]) == 30
    assert not any(worker.is_alive() for worker in workers)


def test_limit_of_damaged_samples(shards: Path) -> None:
    """Substitution has an end: a rate, above a few; every rank decides the same from one sum."""
    index = ShardIndex.load(shards)
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"question", b"Question"))
    dataset = dataset_of(index)
    damaged, sound = dataset[tuple(range(8))], dataset[tuple(range(8, 16))]
    counts = SampleCounts(0.001)
    counts.add(counts.of([damaged]))
    counts.add(counts.of([sound]))
    assert counts.total == {"seen": 16, "unusable": 0, "unreadable": 8, "truncated": 0}
    restored = SampleCounts(0.001)
    restored.load(counts.state())
    for one in (counts, restored):
        with pytest.raises(UserError, match="16 of 24 samples are damaged, more than data.max_un"):
            one.add(one.of([damaged]))
    strict = SampleCounts(0.0)
    with pytest.raises(UserError, match="8 of 8 samples are damaged"):
        strict.add(strict.of([damaged]))
    large = SampleCounts(0.001)
    large.add([200_000, 0, 150, 0])
    assert large.total["unreadable"] > MIN_UNREADABLE


LAYOUTS = [(4, 0), (2, 3), (8, 1), (1, 2)]


def test_case_21_resume_with_other_ranks_and_workers(raw: Raw, tmp_path: Path) -> None:
    """A run of two epochs, cut at every step, goes on with another layout; ledgers are compared."""
    build(Rows("s", [raw(n, n % 3) for n in range(45)]), tmp_path / "out", arguments={},
          shard_size=7)  # fmt: skip
    index = ShardIndex.load(tmp_path / "out")
    dataset, plan = dataset_of(index), plan_of(index, 8, window=2)
    assert plan.steps_per_epoch == 6 and plan.num_real(5) == 5
    num_steps = 2 * plan.steps_per_epoch

    def ledger(first: int, last: int, world_size: int, num_workers: int) -> list[list[int]]:
        """Samples of every step, gathered from all ranks."""
        steps: list[list[int]] = [[] for _ in range(first, last)]
        for rank in range(world_size):
            run = micro_batches(
                dataset, plan, first_step=first, last_step=last, rank=rank,
                world_size=world_size, micro_batch=1, num_workers=num_workers,
            )  # fmt: skip
            for step, batches in zip(steps, run, strict=True):
                step += [number for batch in batches for number in batch.sample_ids]
        return [sorted(step) for step in steps]

    whole = ledger(0, num_steps, 1, 0)
    for epoch in (whole[:6], whole[6:]):
        assert sorted(number for step in epoch for number in step) == list(range(45))
    assert whole[:6] != whole[6:]
    for cut in range(1, num_steps):
        first, second = LAYOUTS[cut % 4], LAYOUTS[(cut + 1) % 4]
        if cut % 3:  # workers cost a second a piece: every third cut is enough with them
            first, second = (first[0], 0), (second[0], 0)
        assert ledger(0, cut, *first) + ledger(cut, num_steps, *second) == whole
    parts = [(0, 4, 4, 2), (4, 7, 2, 0), (7, num_steps, 8, 1)]  # 4 -> 2 -> 8 ranks, over the tail
    assert [step for part in parts for step in ledger(*part)] == whole


def test_one_million_rows_start_fast_and_read_only_the_index(tmp_path: Path) -> None:
    """A made-up index over empty shards: a start opens no tar and stays small."""
    from data_tools.writer import publish_index
    from genrecal_ds.data.index import INDEX_DTYPE

    num_samples, per_shard = 1_000_000, 1000
    rng = np.random.default_rng(0)
    records = np.zeros(num_samples, INDEX_DTYPE)
    records["offset"] = np.arange(num_samples) % per_shard * 1024
    records["length"] = 1024
    records["shard"] = np.arange(num_samples) // per_shard
    records["text_bytes"] = rng.integers(10, 4000, num_samples)
    records["num_images"] = rng.integers(0, 3, num_samples)
    shards = []
    for number in range(num_samples // per_shard):
        name, size = f"shard-{number:06d}.tar", per_shard * 1024
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # sparse: no bytes on disk
        shards.append({"name": name, "bytes": size, "sha256": "0" * 64, "count": per_shard})
    publish_index(tmp_path, records, ["made_up"], shards, {"build": {}})
    program = (
        "import resource, sys, time\n"
        "from genrecal_ds.data.index import ShardIndex\n"
        "from genrecal_ds.data.plan import Order, StepPlan\n"
        "usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, start = usage(), time.perf_counter()\n"
        f"index = ShardIndex.load({str(tmp_path)!r})\n"
        "loaded = time.perf_counter() - start\n"
        "plan = StepPlan(Order(index.classes, index.costs(), '', 0, 256, 50))\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'index.npy' in maps and '.tar' not in maps\n"
        "print(loaded, time.perf_counter() - start - loaded, usage() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, planned, kib = map(float, done.stdout.split())
    assert loaded < 10 and planned < 10 and kib < 2**20, (loaded, planned, kib)


def test_bad_sample_survives_a_worker(shards: Path) -> None:
    """DataLoader rebuilds a worker's exception from its text alone."""
    error = BadSample("shard: sample 1, key k: crc32", shard="shard", key="k")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
