"""How fast samples reach the consumer: ours, webdataset and mosaicml-streaming, side by side.

    python -m benchmarks.loader --out benchmarks/results/loader.json

Every round runs each contestant once over the same samples, warm in the page cache, and the
consumer touches every cache line of what it got; the sum must be the same for all. Ratios are
taken within a round. crc32 is checked by ours only. The peer, in an environment of its own:

    pip install --no-deps mosaicml-streaming==0.13.0 Brotli python-snappy cramjam xxhash zstd \\
        catalogue boto3 botocore jmespath s3transfer
"""

import argparse
import datetime
import io
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.contestants import (
    Members,
    Ours,
    PreparePair,
    Streaming,
    Webdataset,
    import_streaming,
    write_mds,
)
from data_tools.builder import build
from data_tools.sources import RawSample, Rows, assistant, user
from genrecal_ds.data.decode import decode_image, decode_record
from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.loader import PairEncoders
from genrecal_ds.data.plan import Order, StepPlan
from genrecal_ds.data.reader import ShardReader

Contestant = Ours | Webdataset | Streaming


NUM_PICTURES = 256  # different ones; a sample count above it shows them again


def make_samples(count: int) -> Rows:
    """Photograph-like JPEGs of 30 to 120 kB with a question and an answer of a few lines."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(min(count, NUM_PICTURES)):
        width, height = (int(side) for side in rng.integers((336, 336), (641, 481)))
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 9, (height, width, 3))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    samples = []
    for number in range(count):
        text = " ".join(f"what digit is in row {value} ?" for value in rng.integers(0, 9, 6))
        messages = [user(text, 1), assistant(f"it is {number % 10} " * 12)]
        picture = ("jpg", pictures[number % len(pictures)])
        samples.append(RawSample([picture], messages, "photo", [], ""))
    return Rows("bench", samples)


def touch(members: Members) -> int:
    """One byte of every cache line of every member, summed; not the facts webdataset adds."""
    return sum(
        int(np.frombuffer(data, np.uint8)[::64].sum())
        for name, data in members.items()
        if not name.startswith("__")
    )


def touch_pair(pair: Any) -> int:
    """The same for prepared pairs: ids and pixels of both sides."""
    total = 0
    for side in pair.sides:
        total += int(side.input_ids_T.sum())
        total += sum(int(tensor.flatten()[::16].sum() * 1000) for tensor in side.vision.values())
    return total


def race(
    contestants: Sequence[Contestant],
    num_workers: int,
    prepare: Callable | None,
    rounds: int,
    num_bytes: int,
) -> dict[str, dict[str, Any]]:
    """Rates of every contestant, round-robin. The first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    sums, counts = set(), set()
    for number in range(rounds + 1):
        for contestant in contestants:
            start, total, count = time.perf_counter(), 0, 0
            for sample in contestant.samples(num_workers, prepare):
                total += touch_pair(sample) if prepare else touch(sample)
                count += 1
            if number:
                seconds[contestant.name].append(time.perf_counter() - start)
            sums.add(total)
            counts.add(count)
    if len(sums) != 1 or len(counts) != 1:
        raise AssertionError(f"contestants delivered other bytes: sums {sums}, samples {counts}")
    (count,) = counts
    base = np.array(seconds["webdataset"])
    results = {}
    for name, values in seconds.items():
        rate, ratio = count / np.array(values), base / np.array(values)
        results[name] = {
            "samples_per_second": spread(rate),
            "mb_per_second": spread(rate * num_bytes / count / 1e6),
            "ratio_to_webdataset": spread(ratio),
        }
    return results


def spread(values: np.ndarray) -> dict[str, float]:
    """Median with its 10th and 90th percentiles."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"p10": round(low, 3), "median": round(middle, 3), "p90": round(high, 3)}


def where_time_goes(folder: Path, encoders: PairEncoders, count: int) -> dict[str, float]:
    """Microseconds a sample, by stage of ours; medians."""
    reader = ShardReader(ShardIndex.load(folder))
    times: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        times.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
        return result

    assert encoders.teacher is not None
    for i in np.random.default_rng(1).permutation(len(reader))[:count]:
        data = timed("pread and crc32", lambda i=i: reader.tar_bytes(int(i)))
        timed("crc32 alone", lambda data=data: zlib.crc32(data))
        members = timed("pread, crc32 and tar parse", lambda i=i: reader.members(int(i)))
        record = timed("json", lambda members=members: decode_record(members["json"]))
        image = timed("jpeg", lambda members=members: decode_image(members["0.jpg"], "jpg"))
        arguments = (record.messages, [image])
        for side, encoder in encoders.by_side.items():
            timed(f"{side}: text and picture", lambda e=encoder, a=arguments: e.encode(*a))
            texts = [
                {**m, "content": [part for part in m["content"] if part["type"] == "text"]}
                for m in record.messages
            ]
            timed(f"{side}: text alone", lambda e=encoder, t=texts: e.encode(t, []))
    return {name: round(float(np.median(values)), 1) for name, values in times.items()}


def balance(num_samples: int = 20_000) -> dict[str, dict[str, float]]:
    """Padding, and waiting for the slowest rank, of made-up lengths: 8 ranks, 4 micro-steps of 4.

    padded: tokens with padding per real token. waiting: tokens on the critical path (ranks meet
    in every layer of every micro-step) per token of a perfect division.
    """
    rng = np.random.default_rng(0)
    classes = rng.choice(3, num_samples, p=[0.4, 0.5, 0.1]).astype(np.int8)
    lengths = rng.lognormal(5.5, 0.8, num_samples) + np.array([0, 600, 1800])[classes]
    lengths = lengths.astype(np.int64)
    results = {}
    for name, window in (("random batches, random micro-batches", 0),
                         ("window 1, the default: dealt within the batch", 1),
                         ("window 50: batches of like length", 50)):  # fmt: skip
        plan = StepPlan(Order(classes, lengths, "", 0, 128, max(window, 1)))
        padded, real, critical, per_rank = 0, 0, 0, []
        for step in range(plan.steps_per_epoch - 1):
            table = plan.micro_batches(step, 4, 8)
            if window == 0:
                table = plan.slots(step).reshape(table.shape)
            tokens = lengths[table]
            rank_cost = tokens.max(axis=2) * 4
            padded, real = padded + rank_cost.sum(), real + tokens.sum()
            critical += rank_cost.max(axis=1).sum() * 8
            ranks = tokens.sum(axis=(0, 2))
            per_rank.append(ranks.max() / ranks.mean())
        results[name] = {
            "padded": round(padded / real, 3),
            "waiting": round(critical / real, 3),
            "slowest_over_mean_tokens": round(float(np.mean(per_rank)), 3),
        }
    return results


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "webdataset", "mosaicml-streaming", "pillow", "numpy", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def demo_encoders(folder: Path) -> PairEncoders:
    """The demo's pair: a Qwen2-VL and an InternVL of toy size, their real processors."""
    from genrecal_ds.models.chat import ChatEncoder
    from launch.demo.pair import build_pair

    texts = ["what digit is in row 1 ?", "it is 3", "0 1 2 4 5 6 7 8 9"] * 50
    build_pair(texts, folder)
    student, teacher = folder / "student_init", folder / "teacher_init"
    return PairEncoders(ChatEncoder(student, 1 << 20), ChatEncoder(teacher, 1 << 20))


def run(num_samples: int, num_decoded: int, rounds: int) -> dict[str, Any]:
    """All cases; prints tables as it goes."""
    has_streaming = import_streaming() is not None
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": f"{len(os.sched_getaffinity(0))}-core CPU",
        "versions": versions(),
        "rounds": rounds,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        encoders = demo_encoders(root / "pair")
        for count, suffix in ((num_samples, "raw"), (num_decoded, "decoded")):
            build(make_samples(count), root / suffix, arguments={}, shard_size=64)
            reader = ShardReader(ShardIndex.load(root / suffix))
            members = [reader.members(i) for i in range(count)]
            num_bytes = sum(len(value) for sample in members for value in sample.values())
            folder = root / suffix
            contestants: list[Contestant] = [
                Webdataset(folder), Ours(folder, is_random=False), Ours(folder, is_random=True)
            ]  # fmt: skip
            if has_streaming:
                write_mds(root / f"{suffix}-mds", members)
                contestants.append(Streaming(root / f"{suffix}-mds"))
            prepare = PreparePair(encoders) if suffix == "decoded" else None
            for num_workers in (0, 2):
                case = f"{suffix}, {num_workers} workers"
                print(f"{case}: {count} samples of {num_bytes / count / 1e3:.0f} kB", flush=True)
                found = race(contestants, num_workers, prepare, rounds, num_bytes)
                result["cases"][case] = {"samples": count, "bytes": num_bytes, **found}
                show(found)
                if not has_streaming:
                    print("  mosaicml-streaming: not installed")
        result["microseconds"] = where_time_goes(root / "decoded", encoders, num_decoded)
    result["balance"] = balance()
    print(json.dumps({key: result[key] for key in ("microseconds", "balance")}, indent=1))
    return result


def show(found: dict[str, dict[str, Any]]) -> None:
    for name, rates in found.items():
        rate, volume, ratio = rates.values()
        print(
            f"  {name:<24} {rate['median']:>9,.0f} samples/s  {volume['median']:>7,.0f} MB/s  "
            f"x {ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=8192, help="of the raw cases")
    parser.add_argument("--decoded", type=int, default=256, help="of the cases with decoding")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the numbers as JSON")
    args = parser.parse_args(argv)
    result = run(args.samples, args.decoded, args.rounds)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
