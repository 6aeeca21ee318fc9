"""Contestants timed round-robin in one process, each round beside its yardstick."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Contestants = dict[str, Callable[[], Any]]
Found = dict[str, dict[str, Any]]


def without_failures(contestants: Contestants) -> tuple[Contestants, dict[str, str]]:
    """(those that run, {name: why not}); the first two, the yardstick and ours, must run.

    A peer that is out of memory or refuses this machine is a result, not the end of the run.
    """
    running, failed = {}, {}
    for position, (name, run) in enumerate(contestants.items()):
        try:
            run()
        except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
            if position < 2:
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            running[name] = run
    return running, failed


def race(
    contestants: Contestants, rounds: int, yardstick: str, warm_up: int = 1
) -> dict[str, dict]:
    """{name: ms, ratio to the yardstick of the same round, peak bytes beyond what was there}.

    The order turns by one contestant every round, so that no one always follows the same.
    """
    names = list(contestants)
    for _ in range(warm_up):
        for name in names:
            contestants[name]()
    peaks = {name: peak_bytes(contestants[name]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(milliseconds(contestants[name]))
    return {
        name: {
            "ms": spread(times[name]),
            "ratio": spread([t / y for t, y in zip(times[name], times[yardstick], strict=True)]),
            "peak_bytes": peaks[name],
        }
        for name in names
    }


def milliseconds(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that one call holds beyond what was held before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start to stderr
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "min": round(ordered[0], 4),
        "p10": round(ordered[round(0.1 * last)], 4),
        "median": round(statistics.median(ordered), 4),
        "p90": round(ordered[round(0.9 * last)], 4),
    }


def device_facts() -> dict[str, str]:
    facts = {"torch": torch.__version__, "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"device": f"{torch.get_num_threads()}-thread CPU", **facts}
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        **facts,
    }
