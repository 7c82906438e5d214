"""Clocks of a CUDA device: the time that the device itself needs for a call, without the time to queue it."""

import subprocess
from collections import deque
from functools import partial
from weakref import WeakKeyDictionary

import torch

from .timing import Contender, HostClock, Settings, interleave, summary

CYCLES_PER_SECOND = 2e9  # of the device, at most: a delay that is too long does no harm
LEAST_DELAY, MOST_DELAY = 0.5e-3, 64e-3  # seconds
REPLAYED_CALLS = 512
COPIED_BYTES = 2**30
COPY = Settings(seconds=1, least_rounds=10)


class EventClock:
    """Time between CUDA events around each of two calls: one after L2 was cleared, one right after it.

    The device waits until the host has queued both. If it began before that, the measurement is repeated with twice the
    delay, up to MOST_DELAY: beyond that the call itself waits for the device, and that is its time.
    """

    judged = "cold"

    def __init__(self, cleared_bytes, device="cuda", cuda=torch.cuda):
        self.cleared_bytes = cleared_bytes
        self._other = torch.ones(cleared_bytes // 4, device=device)
        self._cuda = cuda
        self._delays = WeakKeyDictionary()  # {contender: delay that sufficed in the rounds before}

    def sets(self, bytes_moved):
        return 1

    def ready(self, contender):
        contender.call()
        self._cuda.synchronize()

    def seconds(self, contender):
        """(cold, warm)"""
        return self._queued(contender, lambda: [partial(contender.run, *contender.prepare()) for _ in range(2)])

    def _queued(self, contender, make_calls):
        """Seconds of each call."""
        delay = self._delays.get(contender, LEAST_DELAY)
        while True:
            seconds, in_time = self._measured(make_calls(), delay)
            if in_time or delay >= MOST_DELAY:
                self._delays[contender] = delay
                return seconds
            delay *= 2

    def _measured(self, calls, delay):
        """(seconds of each call, whether all was queued before the device began)"""
        events = [[self._cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        self._cuda._sleep(int(delay * CYCLES_PER_SECOND))
        self._other.sum()  # read, not written: writing such lines back would slow down what comes next
        for call, (start, end) in zip(calls, events, strict=True):
            start.record()
            call()
            end.record()
        in_time = not events[0][0].query()
        self._cuda.synchronize()
        return tuple(start.elapsed_time(end) / 1e3 for start, end in events), in_time


class GraphClock(EventClock):
    """Time of one call among many in a CUDA graph: inputs by turns from more sets than L2 holds, or always the same."""

    def sets(self, bytes_moved):
        return min(REPLAYED_CALLS, -(-self.cleared_bytes // bytes_moved))

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._graphs = WeakKeyDictionary()

    def ready(self, contender):
        by_turns, sets = [contender.prepare() for _ in range(REPLAYED_CALLS)], self.sets(contender.bytes_moved)
        for arguments in by_turns[:sets]:
            contender.run(*arguments)  # work done only at the first call of a set must not become part of the graph
        self._cuda.synchronize()
        # Keep as many outputs as there are sets, or the device would write all of them to one place in L2.
        graphs = [
            self._captured(contender, by_turns, kept=sets),
            self._captured(contender, by_turns[:1] * REPLAYED_CALLS, kept=1),
        ]
        for graph in graphs:
            graph.replay()  # the first replay brings the graph to the device
        self._cuda.synchronize()
        self._graphs[contender] = graphs

    def _captured(self, contender, arguments, kept):
        graph, outputs = self._cuda.CUDAGraph(), deque(maxlen=kept)
        with self._cuda.graph(graph):
            for each in arguments:
                outputs.append(contender.run(*each))
        return graph

    def seconds(self, contender):
        """(by turns, always one set)"""
        replays = [graph.replay for graph in self._graphs[contender]]
        return tuple(seconds / REPLAYED_CALLS for seconds in self._queued(contender, lambda: replays))


def clocks():
    """{name: clock}, for the cases on the device."""
    cleared = 2 * torch.cuda.get_device_properties("cuda").L2_cache_size
    return {
        "events": EventClock(cleared),
        "graph": GraphClock(cleared),
        "latency": HostClock(finish=torch.cuda.synchronize),
    }


def copy_bandwidth(clock, size=COPIED_BYTES, device="cuda"):
    """Measure a copy of `size` bytes on the device; its bytes per second count bytes read and bytes written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    contender = Contender(lambda: target.copy_(source), bytes_moved=2 * size)
    clock.ready(contender)
    times = interleave({"copy": contender}, clock, COPY)["copy"]
    return {"bytes_moved": 2 * size, **summary(times, 2 * size, clock.judged)}


def driver():
    """Version of the driver from nvidia-smi; None without nvidia-smi."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def machine():
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver(),
        "cuda": torch.version.cuda,
    }
