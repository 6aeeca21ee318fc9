"""Notes a request to stop, by a signal or a file; the ranks stop together, at a step's end.

SLURM, launchers and people send SIGUSR1 or SIGTERM before a job is taken away. A rank only
remembers the signal: if one rank left alone, the others would wait in a collective for ever.
"""

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOP_FILE = "STOP"  # `touch RUN_DIR/STOP`: where no signal reaches the ranks

_received: list[str] = []


def listen() -> None:
    """Remember the signals from now on. Before heavy imports: SIGUSR1 ends a process by default."""
    for number in SIGNALS:
        signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def reason(run_dir: Path) -> str | None:
    """Say why this rank wants to stop: a signal's name, STOP for the file, None to go on."""
    if _received:
        return _received[0]
    return STOP_FILE if (run_dir / STOP_FILE).exists() else None
