"""Run on every rank: load a folder sharded and watch how much memory this process itself takes.

ranks_memory.py FOLDER TOTAL_BYTES LARGEST_BYTES
"""

import re
import sys
import threading
from pathlib import Path

from genrecal_ds import dist
from genrecal_ds.training import engine
from genrecal_ds.training.weights import load_vlm_sharded

SLACK = 16 << 20  # libraries that load on the way, and the allocator's own


def anonymous_bytes() -> int:
    """Memory of its own; pages of a file that is mapped belong to the system's cache."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def main() -> None:
    folder, total, largest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine.start()
    load_vlm_sharded(Path(sys.argv[4]), "student_zero3", "fp32")  # what only the first load takes
    peak = Peak()
    peak.start()
    vlm = load_vlm_sharded(folder, "student_zero3", "fp32")
    peak.is_over.set()
    peak.join()
    grown = peak.peak_bytes - peak.start_bytes
    most = total // dist.world_size() + largest + SLACK
    said = f"rank {dist.rank()}: {grown >> 20} MiB of {total >> 20}, allowed {most >> 20}"
    print(said)
    assert grown <= most, said
    del vlm
    dist.leave()


if __name__ == "__main__":
    main()
