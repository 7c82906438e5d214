"""Fixtures of the benchmarks' tests: small cases, and the host in place of a GPU."""

import gc
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.harness import checked, device
from benchmarks.harness.measure import COPY_BANDWIDTH, MICROSECONDS, Target
from benchmarks.harness.op_case import OpCase
from benchmarks.harness.timing import HostClock
from benchmarks.suites import core


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # takes longer than all else of a small case
    return HostClock(cache_bytes=1024)


@pytest.fixture
def registry(monkeypatch):
    """Two small cases in place of those of the host."""
    cases = [
        OpCase("state", "power", 2, 33, 32, against=("plain", "sum"), targets=(Target("plain", at_least=1e9),)),
        OpCase("mix", "product", 2, 33, 32, against=("copy",)),
    ]
    monkeypatch.setitem(core.CASES, "cpu", {case.name: case for case in cases})
    return cases


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def stand_in(monkeypatch):
    """The host in place of the device: the same cases, clocks by the same names."""
    targets = (Target(COPY_BANDWIDTH, at_least=1e-9), Target(MICROSECONDS, at_most=1e-3))
    cases = [
        OpCase("mix", "product", 2, 33, 32, clock="graph", targets=targets),
        OpCase("state", "power", 2, 33, 32, clock="events"),
    ]

    class Clock(HostClock):
        judged = "cold"

    monkeypatch.setitem(core.CASES, "cuda", {case.name: case for case in cases})
    monkeypatch.setattr(checked, "require", lambda name: None)
    monkeypatch.setattr(device, "clocks", lambda: {name: Clock(1024) for name in ("events", "graph", "latency")})
    monkeypatch.setattr(device, "machine", lambda: {"gpu": "A GPU", "driver": "1.2.3", "cuda": "13.0"})
    monkeypatch.setattr(device, "copy_bandwidth", partial(device.copy_bandwidth, size=4096, device="cpu"))
    return cases
