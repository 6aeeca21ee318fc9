"""Prints the fingerprint of folders of shards, and whether several hold the same samples.

`fingerprint` identifies the files; a run resumes only with the same fingerprint. `content`
identifies the samples in their order, whatever the size of the shards.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from genrecal_ds.console.command import command
from genrecal_ds.data.index import ShardIndex

EXAMPLE = """example:
  python -m data_tools.fingerprint shards/train copy/train
"""


def content(index: ShardIndex) -> str:
    """sha256 hex over length and crc32 of every sample, in order."""
    pairs = np.stack([index.records["length"], index.records["crc32"].astype(np.int64)])
    return hashlib.sha256(pairs.astype("<i8").tobytes()).hexdigest()


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 1 (folders differ in content) or 2 (a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.fingerprint", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directories", nargs="+", metavar="SHARDS")
    args = parser.parse_args(argv)
    contents = set()
    for directory in args.directories:
        index = ShardIndex.load(directory)
        contents.add(content(index))
        print(f"{directory}: {len(index)} samples in {len(index.shards)} shards")
        print(f"  fingerprint {index.fingerprint}")
        print(f"  content     {content(index)}")
    return 1 if len(contents) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
