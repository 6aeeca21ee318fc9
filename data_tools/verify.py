"""Scans a folder of shards whole: file hashes, every sample's crc32 and decoding, its tar keys.

Prints one line per defect. The keys are also read sequentially with webdataset's own stages, as
any webdataset user would, and must be the same in the same order.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_tools.progress import progress_bar
from genrecal_ds.console.command import command
from genrecal_ds.console.text import printable
from genrecal_ds.data.index import ShardIndex, file_sha256
from genrecal_ds.data.reader import TAR_ERRORS, BadSample, ShardReader, tar_stages

EXAMPLE = """example:
  python -m data_tools.verify shards/train
"""


def defects(index: ShardIndex, reader: ShardReader) -> Iterator[str | None]:
    """Scan shard by shard: one item per sample, a line for a bad sample, None for a sound one.

    Lines about whole files come in between.
    """
    yield from index.file_defects()
    seen: set[str] = set()
    numbers = index.records["shard"]
    is_mix = "mix" in index.build
    for shard_number, shard in enumerate(index.shards):
        path = index.directory / shard.name
        if not path.is_file() or path.is_symlink():
            continue  # file_defects has named it
        if (actual := file_sha256(path)) != shard.sha256:
            yield f"{path}: sha256 {actual} is not the manifest's {shard.sha256}"
        keys = []
        samples = np.flatnonzero(numbers == shard_number)
        if is_mix:  # it may name a sample twice; one look is enough
            offsets = index.records["offset"][samples]
            samples = samples[np.unique(offsets, return_index=True)[1]]
        for i in samples:
            try:
                key = reader.read(int(i)).key
            except BadSample as error:
                yield str(error)
                continue
            keys.append(key)
            yield f"{path}: key {key} occurs twice" if key in seen and not is_mix else None
            seen.add(key)
        # with bad samples, already listed, the two readings cannot agree
        if len(keys) == shard.count or is_mix:
            yield from filter(None, [_sequential_defect(path, keys, is_mix)])


def _sequential_defect(path: Path, keys: list[str], is_mix: bool) -> str | None:
    """Compare the index's keys with those that plain webdataset reads; a mix may lack some."""
    expand, group = tar_stages()
    with path.open("rb") as stream:
        try:
            keys_read = [
                sample["__key__"]
                for sample in group(expand([{"url": path.name, "stream": stream}]))
            ]
        except TAR_ERRORS as error:
            return f"{path}: webdataset cannot read it: {type(error).__name__}: {error}"[:300]
    if (not set(keys) <= set(keys_read)) if is_mix else keys_read != keys:
        return f"{path}: webdataset's {len(keys_read)} keys are not the index's {len(keys)}"
    return None


def run(directory: Path) -> int:
    """Print every defect and a summary; 0 when there is none, else 1."""
    index = ShardIndex.load(directory, check_files=False)
    num_defects = 0
    with progress_bar() as progress:
        task = progress.add_task("verifying", total=len(index))
        for line in defects(index, ShardReader(index)):
            if line is None:
                progress.advance(task)
            else:
                num_defects += 1
                print(printable(line))
    verdict = f"{num_defects} defects" if num_defects else "sound"
    print(f"{directory}: {len(index.shards)} shards, {len(index)} samples, {verdict}")
    return 1 if num_defects else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 (sound), 1 (defects) or 2 (no readable folder)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.verify",
        description="Check every byte of a folder of shards; lists each defect.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR")
    args = parser.parse_args(argv)
    return run(args.directory)


if __name__ == "__main__":
    sys.exit(main())
