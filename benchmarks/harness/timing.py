"""Times several contenders by turns, so that a disturbance of the machine hits all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True, eq=False)
class Contender:
    """A call to time. `prepare` runs before every call, untimed; its results are the arguments of `run`."""

    run: Callable
    prepare: Callable[[], tuple] = tuple
    bytes_moved: int | None = None  # the fewest bytes of memory that it has to read and write

    def call(self):
        return self.run(*self.prepare())


@dataclass(frozen=True)
class Settings:
    """How long to measure a case: until `seconds` are over, but at least `least_rounds` and at most `most_rounds`."""

    seconds: float = 1.5
    least_rounds: int = 3
    most_rounds: int = 40


def last_level_cache_bytes():
    """From Linux ("32768K"), else 32 MiB."""
    return 1024 * int(LAST_LEVEL_CACHE.read_text().strip().rstrip("K")) if LAST_LEVEL_CACHE.exists() else 32 * 2**20


class HostClock:
    """Wall-clock time of two calls in a row: one after the caches were cleared, one right after it.

    finish: waits for the work that a call queued on a device.
    """

    judged = "warm"  # which of the two is reported first and judged by the targets

    def __init__(self, cache_bytes=None, finish=lambda: None):
        self.cleared_bytes = 2 * (cache_bytes or last_level_cache_bytes())
        self._other = torch.ones(self.cleared_bytes // 4)
        self._finish = finish

    def sets(self, bytes_moved):
        """Number of sets of inputs to take by turns."""
        return 1

    def ready(self, contender):
        """The first call, which is not timed: it compiles, starts threads, takes memory from the system."""
        contender.call()

    def seconds(self, contender):
        """(cold, warm)"""
        arguments = [contender.prepare() for _ in range(2)]
        self._other.sum()  # read, not written: writing such lines back would slow down what comes next
        self._finish()
        seconds = []
        for i in range(2):
            start = time.perf_counter()
            contender.run(*arguments[i])
            self._finish()
            seconds.append(time.perf_counter() - start)
        return tuple(seconds)


def interleave(contenders, clock, settings):
    """Rounds A, B, C, A, B, C, ... of contenders that are ready: {name: [(cold, warm) seconds of every round]}."""
    times = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for i in range(settings.most_rounds):
            if i >= settings.least_rounds and time.perf_counter() - start > settings.seconds:
                break
            for name, contender in contenders.items():
                times[name].append(clock.seconds(contender))
    finally:
        gc.enable()
    return times


def other(judged):
    return {"cold": "warm", "warm": "cold"}[judged]


def summary(seconds, bytes_moved, judged):
    """Median, least, interquartile range and bytes per second of the judged calls, and the median of the others."""
    times = dict(zip(("cold", "warm"), zip(*seconds, strict=True), strict=True))
    median = statistics.median(times[judged])
    low, _, high = statistics.quantiles(times[judged], n=4, method="inclusive")
    return {
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times[judged]),
        "iqr_ms": 1e3 * (high - low),
        f"{other(judged)}_median_ms": 1e3 * statistics.median(times[other(judged)]),
        "rounds": len(seconds),
        "bytes_per_second": None if bytes_moved is None else bytes_moved / median,
    }


def ratios(times, ours):
    """Time of every other contender over ours, {"cold": {name: ratio}, "warm": ...}: medians over rounds, not ratios of
    medians, since the times of a round were measured side by side."""

    def ratio(name, i):
        return statistics.median(theirs[i] / own[i] for theirs, own in zip(times[name], times[ours], strict=True))

    return {kind: {name: ratio(name, i) for name in times if name != ours} for i, kind in enumerate(("cold", "warm"))}
