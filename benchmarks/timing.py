"""Takes the time of several contenders by turns, so that whatever disturbs the machine disturbs all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
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

    seconds: float = 2.0
    least_rounds: int = 5
    most_rounds: int = 40


class HostClock:
    """Wall-clock time of a call whose inputs are not in the cache."""

    def __init__(self):
        size = LAST_LEVEL_CACHE.read_text().strip() if LAST_LEVEL_CACHE.exists() else "32768K"
        self.flushed_bytes = 2 * 1024 * int(size.removesuffix("K"))
        self._other = torch.ones(self.flushed_bytes // 4)

    def seconds(self, contender):
        arguments = contender.prepare()
        self._other.sum()  # read, not written: writing such lines back would slow down what comes next
        start = time.perf_counter()
        contender.run(*arguments)
        return time.perf_counter() - start


def interleave(contenders, clock, settings):
    """Rounds A, B, C, A, B, C, ...: {name: [seconds of every round]}. Every contender has to be warm."""
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


def summary(seconds, bytes_moved):
    """Median, least and interquartile range in ms, and the bytes moved per second at the median."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(seconds),
        "iqr_ms": 1e3 * (high - low),
        "rounds": len(seconds),
        "bytes_per_second": None if bytes_moved is None else bytes_moved / median,
    }


def ratio(baseline, ours):
    """How many times as long the baseline takes: the median over rounds, whose times were taken side by side."""
    return statistics.median(b / o for b, o in zip(baseline, ours, strict=True))
