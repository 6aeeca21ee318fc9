"""Run on every rank: launch/train.py, with its bytes counted.

    ranks_measure.py OUT RANKS_PER_HOST RECIPE [key=value ...]

OUT/rank0.json: `wire`, bytes that this rank received in all-gathers and reduce-scatters, by phase
of the trainer and size of the group; `peak`, the largest sum of bytes that its tensors held at
once, by phase. RANKS_PER_HOST 0: all ranks are on one host, as they are; else the ranks believe
to be on hosts of so many.
"""

import json
import os
import socket
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as torch_dist

from genrecal_ds.objectives import report
from tests.live_bytes import LiveBytes

RANK = int(os.environ["RANK"])
wire: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
clocks: list[report.Clock] = []


def phase() -> str:
    return (clocks[-1].current or "load") if clocks else "load"


def counted(name: str, whole: int) -> None:
    """Replace a collective of torch.distributed; argument `whole` holds all ranks' parts."""
    collective = getattr(torch_dist, name)

    def wrapper(*args, **kwargs):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        size = torch_dist.get_world_size(kwargs.get("group"))
        wire[phase()][str(size)] += tensors[whole].nbytes * (size - 1) // size
        return collective(*args, **kwargs)

    setattr(torch_dist, name, wrapper)


def main() -> int:
    out, per_host = Path(sys.argv[1]), int(sys.argv[2])
    counted("all_gather_into_tensor", whole=0)
    counted("reduce_scatter_tensor", whole=1)
    if per_host:
        socket.gethostname = lambda: f"host{RANK // per_host}"
    begin = report.Clock.__init__

    def remember(clock: report.Clock) -> None:
        begin(clock)
        clocks.append(clock)

    report.Clock.__init__ = remember
    from launch.train import main as train

    with LiveBytes(phase) as live:
        code = train(sys.argv[3:])
    out.mkdir(parents=True, exist_ok=True)
    found = {"wire": wire, "peak": live.peak}
    (out / f"rank{RANK}.json").write_text(json.dumps(found, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
