"""The clocks of the benchmarks, turns and ratios, on a simulated device."""

import itertools
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.harness import device
from benchmarks.harness.device import CYCLES_PER_SECOND, LEAST_DELAY, MOST_DELAY, REPLAYED_CALLS, EventClock, GraphClock
from benchmarks.harness.measure import OURS, Target
from benchmarks.harness.op_case import OpCase
from benchmarks.harness.timing import Contender, Settings, interleave, ratios, summary


def test_turns_and_ratios():
    calls = []

    class Clock:
        def seconds(self, contender):
            calls.append(contender.run())
            return (4.0, 2.0) if contender.run() == "ours" else (2.0, len(calls) / 2)

    contenders = {name: Contender(lambda name=name: name) for name in ("ours", "other")}
    times = interleave(contenders, Clock(), Settings(seconds=0, least_rounds=3))
    assert calls == ["ours", "other"] * 3
    assert times["other"] == [(2.0, 1.0), (2.0, 2.0), (2.0, 3.0)]
    assert ratios(times, "ours") == {"cold": {"other": 0.5}, "warm": {"other": 1.0}}
    assert summary(times["other"], 4, "warm") == {
        "median_ms": 2e3, "min_ms": 1e3, "iqr_ms": 1e3, "cold_median_ms": 2e3, "rounds": 3, "bytes_per_second": 2.0,
    }  # fmt: skip
    assert summary(times["other"], 4, "cold") == {
        "median_ms": 2e3, "min_ms": 2e3, "iqr_ms": 0.0, "warm_median_ms": 2e3, "rounds": 3, "bytes_per_second": 2.0,
    }  # fmt: skip


class Simulated:
    """A device with a queue, in the place of torch.cuda: calls cost time on the host, and then on the device."""

    def __init__(self):
        self.host = self.device = 0.0  # when each has done all that it was given
        self.sleeps = []
        self.capturing = None

    def work(self, host, device):
        self.host += host
        if self.capturing:
            self.capturing.seconds += device
        else:
            self.device = max(self.device, self.host) + device

    def _sleep(self, cycles):
        self.sleeps.append(cycles / CYCLES_PER_SECOND)
        self.work(0, cycles / CYCLES_PER_SECOND)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def Event(self, enable_timing):
        assert enable_timing
        return SimulatedEvent(self)

    def CUDAGraph(self):
        return SimulatedGraph(self)

    @contextmanager
    def graph(self, graph):
        self.capturing = graph
        yield
        self.capturing = None


class SimulatedEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = max(self.cuda.host, self.cuda.device)

    def query(self):
        return self.at <= self.cuda.host

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class SimulatedGraph:
    def __init__(self, cuda):
        self.cuda, self.seconds = cuda, 0.0

    def replay(self):
        self.cuda.work(1e-4, self.seconds)


def test_event_clock_waits_for_the_host_to_queue():
    cuda = Simulated()
    clock = EventClock(1024, device="cpu", cuda=cuda)
    quick = Contender(lambda: cuda.work(host=1e-4, device=1e-5))
    slow = Contender(lambda: cuda.work(host=3e-3, device=2e-5))
    assert clock.seconds(quick) == pytest.approx((1e-5, 1e-5))
    assert cuda.sleeps == [LEAST_DELAY]
    assert clock.seconds(slow) == pytest.approx((2e-5, 2e-5))  # not the 3 ms that the host takes
    assert cuda.sleeps[1:] == [LEAST_DELAY * 2**i for i in range(5)]
    clock.seconds(slow)
    assert cuda.sleeps[6:] == [LEAST_DELAY * 16]  # remembered
    clock.seconds(quick)
    assert cuda.sleeps[7:] == [LEAST_DELAY]


def test_event_clock_of_a_call_that_waits_itself():
    cuda = Simulated()

    def run():
        cuda.work(host=0, device=1e-3)
        cuda.synchronize()
        cuda.work(host=1e-3, device=1e-3)

    assert EventClock(1024, device="cpu", cuda=cuda).seconds(Contender(run)) == pytest.approx((3e-3, 3e-3))
    assert cuda.sleeps[-1] == MOST_DELAY and len(cuda.sleeps) < 10


def test_event_clock_prepares_every_call():
    prepared, ran = itertools.count(), []
    clock = EventClock(1024, device="cpu", cuda=Simulated())
    clock.ready(Contender(ran.append, lambda: (next(prepared),)))
    clock.seconds(Contender(ran.append, lambda: (next(prepared),)))
    assert ran == sorted(ran) and len(ran) >= 3


def test_graph_clock_takes_inputs_by_turns():
    cuda, ran = Simulated(), []
    clock = GraphClock(1000, device="cpu", cuda=cuda)
    sets = clock.sets(300)
    assert sets == 4 and clock.sets(1) == REPLAYED_CALLS and clock.sets(10**6) == 1

    def run(i):
        ran.append(i)
        cuda.work(host=1e-4, device=1e-6 * (1 + i))

    turns = itertools.cycle(range(sets))
    contender = Contender(run, lambda: (next(turns),), bytes_moved=300)
    clock.ready(contender)
    assert ran[:sets] == list(range(sets))  # every set once before the capture
    by_turns, same = ran[sets : sets + REPLAYED_CALLS], ran[sets + REPLAYED_CALLS :]
    assert by_turns == [i % sets for i in range(REPLAYED_CALLS)] and same == [0] * REPLAYED_CALLS
    calls = len(ran)
    assert clock.seconds(contender) == pytest.approx((2.5e-6, 1e-6))
    assert len(ran) == calls  # replayed, not called


def test_graph_clock_keeps_as_many_outputs_as_inputs():
    clock = GraphClock(1000, device="cpu", cuda=Simulated())

    class Output:
        alive = most = 0

        def __init__(self):
            Output.alive += 1
            Output.most = max(Output.most, Output.alive)

        def __del__(self):
            Output.alive -= 1

    clock.ready(Contender(Output, bytes_moved=300))
    assert Output.most == 5 and Output.alive == 0  # the newest is made before the oldest goes


def test_updates_of_a_set_share_its_state():
    case = OpCase("update", "product", 2, 33, 32)
    with torch.inference_mode():
        contender = case.setup(sets=2).contenders[OURS]()
        first, second, again = (contender.prepare()[0]["state"] for _ in range(3))
    assert again is first and second is not first


def test_copy_bandwidth_counts_both_directions():
    class Clock:
        judged = "cold"
        ready = staticmethod(Contender.call)
        seconds = staticmethod(lambda contender: (1e-3, 1e-4))

    row = device.copy_bandwidth(Clock(), size=4096, device="cpu")
    assert row["bytes_moved"] == 8192 and row["bytes_per_second"] == pytest.approx(8.192e6)


def test_rounds_are_bounded():
    class Clock:
        seconds = staticmethod(lambda contender: (1.0, 1.0))

    times = interleave({"a": Contender(tuple)}, Clock(), Settings(seconds=60, least_rounds=1, most_rounds=4))
    assert len(times["a"]) == 4


def test_target():
    assert Target("plain", at_least=2).judged({"plain": 2.0})["reached"] is True
    assert Target("plain", at_least=2).judged({"plain": 1.9})["reached"] is False
    assert Target("state", at_most=2).judged({"state": 2.1})["reached"] is False
    assert Target("plain", at_least=2).judged({}) == {
        "of": "plain", "at_least": 2, "at_most": None, "measured": None, "reached": None,
    }  # fmt: skip
