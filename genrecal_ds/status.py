"""Prints how a run stands, from its folder alone: needs no torch, GPU or running process.

python -m genrecal_ds.status RUN [--json]
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError

RECENT = 20  # logged steps that speed is taken from


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 2 when the folder is no run."""
    parser = argparse.ArgumentParser(prog="python -m genrecal_ds.status", description=__doc__)
    parser.add_argument("run", type=Path, help="a recipe's run_dir")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    stages = list(stages_of(arguments.run))
    if not stages:
        raise UserError(f"{arguments.run}: no stage was started here; name a run_dir")
    state = {"run": str(arguments.run), "state": state_of(arguments.run), "stages": stages}
    if arguments.json:
        print(json.dumps(state, indent=2))
    else:
        show(state, Console(width=None if sys.stdout.isatty() else 132))
    return 0


def state_of(run: Path) -> str:
    """Say done, stopped (with why and where), or the age of the last line written."""
    if (run / "DONE").is_file():
        return "done"
    if (run / "STOPPED").is_file():
        stop = json.loads((run / "STOPPED").read_text())
        return f"stopped by {stop['why']} in {stop['stage']}, step {stop['step']}; can go on"
    written = [path.stat().st_mtime for path in run.glob("*/ledger.jsonl")]
    return f"last step {_duration(time.time() - max(written))} ago" if written else "starting"


def stages_of(run: Path) -> Iterator[dict[str, Any]]:
    """Collect the facts of every stage that was started, in the order of their starts."""
    starts = run.glob("*/start.json")
    for start in sorted(starts, key=lambda path: path.stat().st_ctime_ns):
        yield stage_facts(start.parent)


def stage_facts(folder: Path) -> dict[str, Any]:
    """Collect step, time left, speed, last checkpoint and faults of one stage."""
    steps = json.loads((folder / "start.json").read_text()).get("steps")
    lines, ledger = _lines(folder / "metrics.jsonl"), _lines(folder / "ledger.jsonl")
    last = lines[-1] if lines else {}
    step = ledger[-1]["step"] if ledger else 0
    recent = lines[-RECENT:]
    seconds = sum(line["seconds"] for line in recent) / len(recent) if recent else None
    saves = _lines(folder / "checkpoints" / "saves.jsonl")
    faults = [line for path in folder.glob("faults/rank*.jsonl") for line in _lines(path)]
    is_done = (folder / "DONE").is_file()
    return {
        "name": folder.name,
        "is_done": is_done,
        "step": step,
        "steps": steps,
        "seconds_left": 0 if is_done else (steps - step) * seconds if seconds and steps else None,
        "seconds_per_step": seconds,
        "tokens_per_second": last.get("tokens_per_second", {}).get("step"),
        "loss": last.get("metrics", {}).get("loss"),
        "world_size": last.get("world_size"),
        "checkpoint": saves[-1] if saves else None,
        "skipped_steps": last.get("skipped", 0),
        "spikes": len({line["step"] for line in faults if line["kind"].startswith("spike")}),
        "stalls": len(list(folder.glob("faults/stall-rank*.txt"))),
        "unreadable": last.get("left_out", {}).get("unreadable", 0),
    }


def show(state: dict[str, Any], console: Console) -> None:
    """Print the facts as a table."""
    console.print(f"{state['run']}: {state['state']}", soft_wrap=True)
    table = Table("stage", "step", "left", "s/step", "tokens/s", "loss", "checkpoint", "faults")
    for stage in state["stages"]:
        saved = stage["checkpoint"]
        size = f"step {saved['step']}, {saved['bytes'] / 2**20:.0f} MiB" if saved else "-"
        when = f", {_duration(time.time() - saved['time'])} ago" if saved else ""
        faults = [
            f"{stage[name]} {word}"
            for name, word in (
                ("skipped_steps", "skipped"), ("spikes", "spikes"), ("stalls", "stalls"),
                ("unreadable", "unreadable"),
            )
            if stage[name]
        ]  # fmt: skip
        left = "done" if stage["is_done"] else _duration(stage["seconds_left"])
        table.add_row(
            stage["name"], f"{stage['step']}/{stage['steps']}", left,
            _number(stage["seconds_per_step"], ".2f"), _number(stage["tokens_per_second"], ",.0f"),
            _number(stage["loss"], ".4f"), size + when, ", ".join(faults) or "-",
        )  # fmt: skip
    console.print(table)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a log to which a run may be writing."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


if __name__ == "__main__":
    sys.exit(main())
