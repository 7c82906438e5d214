"""Takes the time of several contenders by turns, so that whatever disturbs the machine disturbs all of them alike."""

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
    """One thing to time. `prepare` runs before every call, untimed, and hands what it returns to `run`."""

    run: Callable
    prepare: Callable[[], tuple] = tuple
    bytes_moved: int | None = None  # memory that it cannot do without reading or writing

    def call(self):
        return self.run(*self.prepare())


@dataclass(frozen=True)
class Settings:
    """How long to measure a case: until `seconds` are over, but so many rounds at least and at most."""

    seconds: float = 1.5
    least_rounds: int = 3
    most_rounds: int = 40


def last_level_cache_bytes():
    """As Linux has it ("32768K"), else 32 MiB."""
    return 1024 * int(LAST_LEVEL_CACHE.read_text().strip().rstrip("K")) if LAST_LEVEL_CACHE.exists() else 32 * 2**20


class HostClock:
    """Wall-clock time of two calls in a row: one after the caches were cleared, one that finds what the first left.

    finish: waits for what a call queued, on a device that the host runs ahead of.
    """

    judged = "warm"  # which of the two is reported first and held against the targets

    def __init__(self, cache_bytes=None, finish=lambda: None):
        self.cleared_bytes = 2 * (cache_bytes or last_level_cache_bytes())
        self._other = torch.ones(self.cleared_bytes // 4)
        self._finish = finish

    def sets(self, bytes_moved):
        """How many sets of inputs to take by turns."""
        return 1

    def ready(self, contender):
        """What must not be timed: the first call compiles, starts threads, takes memory from the system."""
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
    """Rounds A, B, C, A, B, C, ...: {name: [(cold, warm) seconds of every round]}, of contenders made ready before."""
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
    """Of the judged calls the median, least and interquartile range and the bytes moved per second; of the others the
    median."""
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
    """How many times as long every other contender takes, {"cold": {name: ratio}, "warm": ...}: medians over rounds,
    not ratios of medians, since the times of a round were taken side by side."""

    def ratio(name, i):
        return statistics.median(theirs[i] / own[i] for theirs, own in zip(times[name], times[ours], strict=True))

    return {kind: {name: ratio(name, i) for name in times if name != ours} for i, kind in enumerate(("cold", "warm"))}
