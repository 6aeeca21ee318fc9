"""Turns a stall into an error: a thread without progress says who, where, why, and ends the rank.

Every rank tells a common store how far it is. The rank that is least far holds up the others; a
rank that is stopped or gone cannot say so itself. Ending the process frees the machines: a rank
that is stuck in a collective answers to nothing else.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as torch_dist
from torch import nn

from genrecal_ds import dist
from genrecal_ds.objectives.report import Clock

Place = dict[str, Any]  # step, phase, count of phases begun

EXIT_STALLED = 70
STORE_SECONDS = 10  # the store's host may be the rank that is stopped


class Watchdog:
    """Watches the main thread's clock: every phase that begins is progress.

    seconds: time without progress until this rank ends itself; 0 = never. modules: names ->
    modules in which the main thread may be stuck.
    """

    def __init__(self, folder: Path, seconds: float, clock: Clock, modules: Mapping[str, Any]):
        self.folder, self.seconds, self.clock, self.modules = folder, seconds, clock, modules
        self.step = 0  # set by the trainer
        self._main = threading.main_thread().ident
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        if self._thread:
            self._thread.join(STORE_SECONDS)

    def _watch(self) -> None:
        board = _Board.join()
        interval = min(10.0, self.seconds / 4)
        board.post(self._place())
        seen, since = self.clock.phases_begun, time.monotonic()
        woke = since
        while not self._ending.wait(interval):
            now, last = time.monotonic(), woke
            # A thread that slept too long was stopped (a suspended job) and starts to count anew.
            if self.clock.phases_begun != seen or now - last > 3 * interval + STORE_SECONDS:
                seen, since = self.clock.phases_begun, now
            woke = now
            board.post(self._place())
            idle = now - since
            if idle > self.seconds and not self._ending.is_set():
                self._end(board, idle, interval)

    def _place(self) -> Place:
        return {
            "step": self.step + 1, "phase": self.clock.current, "count": self.clock.phases_begun,
        }  # fmt: skip

    def _end(self, board: "_Board", idle: float, interval: float) -> None:
        place = self._place()
        module = self._stuck_module(sys._current_frames().get(self._main or 0))
        where = _described(place) + (f", module {module}" if module else "")
        line = f"rank {dist.rank()}: no progress for {idle:.0f} s in {where}"
        path = self.folder / f"stall-rank{dist.rank()}.txt"
        try:
            line += "; " + board.who_is_behind(place, interval)
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(line + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            line += f"; stacks: {path}"
        finally:  # a full disk must not keep the run alive
            print(line, file=sys.stderr, flush=True)
            os._exit(EXIT_STALLED)

    def _stuck_module(self, frame: FrameType | None) -> str | None:
        """Name the innermost module that the main thread is in."""
        names = {
            id(module): ".".join(filter(None, (root, name)))
            for root, tree in self.modules.items()
            for name, module in tree.named_modules()
        }
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                return names[id(owner)]
            frame = frame.f_back
        return None


class _Board:
    """The store at which the ranks met; there each rank writes how far it is."""

    def __init__(self, store: torch_dist.Store | None):
        self._store = store
        self._posts = 0

    @classmethod
    def join(cls) -> "_Board":
        """Open a new connection: the process group's connection is not for several threads."""
        if not dist.is_initialized() or dist.world_size() == 1:
            return cls(None)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=STORE_SECONDS)
        try:
            store = torch_dist.TCPStore(host, port, is_master=False, timeout=timeout)
        except RuntimeError:  # watch without naming other ranks
            return cls(None)
        return cls(torch_dist.PrefixStore("genrecal-watchdog", store))

    def post(self, place: Place) -> None:
        if self._store is None:
            return
        self._posts += 1
        text = json.dumps({**place, "posts": self._posts})
        store = self._store
        _quietly(lambda: store.set(f"{dist.rank()}", text))

    def who_is_behind(self, place: Place, interval: float) -> str:
        """Name, in a line, a rank that has fallen silent, or else the rank that is least far."""
        if self._store is None:
            return "no store: nothing is known of other ranks"
        gone = "the store does not answer: rank 0 is stopped or gone"
        before = self._read()
        if before is None:
            return gone
        for _ in range(6):  # the others ask the same now: we must not look silent
            self.post(place)
            time.sleep(interval / 3)
        after = self._read()
        if after is None:
            return gone
        silent = [rank for rank, place in after.items() if place == before.get(rank)]
        if silent:
            word = "rank " + ", ".join(map(str, silent[:8])) + " is stopped or gone, last seen in "
            return word + _described(after[silent[0]])
        behind = min(after, key=lambda rank: after[rank]["count"])
        return f"least far: rank {behind} in {_described(after[behind])}"

    def _read(self) -> dict[int, Place] | None:
        store, places = self._store, {}
        assert store is not None

        def read() -> None:
            for rank in range(dist.world_size()):
                if store.check([f"{rank}"]):
                    places[rank] = json.loads(store.get(f"{rank}"))

        return places if _quietly(read) else None


def _described(place: Place) -> str:
    return f"step {place['step']}, phase {place['phase'] or '-'}"


def _quietly(call: Any) -> bool:
    """Run a call to the store that may never return; True if it returned without an error."""
    done: list[bool] = []

    def attempt() -> None:
        try:
            call()
            done.append(True)
        except (RuntimeError, ValueError, OSError):
            pass  # the store is gone, which this function exists for

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(STORE_SECONDS)
    return bool(done)
