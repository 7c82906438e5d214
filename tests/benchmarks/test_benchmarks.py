"""The benchmarks: every registered case at a small size passes its own check, and the results are as documented."""

import dataclasses
import gc
import itertools
import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from pom_ext.ops import _library, reference

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks import baselines, device, device_cases, ops, run
from benchmarks.cases import CASES, TARGETS
from benchmarks.device import CYCLES_PER_SECOND, LEAST_DELAY, MOST_DELAY, REPLAYED_CALLS, EventClock, GraphClock
from benchmarks.measure import COPY_BANDWIDTH, MICROSECONDS, OURS, Target, as_tuple, check
from benchmarks.memory import MemoryCase
from benchmarks.ops import OpCase, with_state
from benchmarks.timing import Contender, HostClock, Settings, interleave, ratios, summary

ROUNDS = Settings(seconds=0, least_rounds=2)
SAME = ("plain", "cumsum", "float32")  # baselines that compute what the case does
OWN = (COPY_BANDWIDTH, MICROSECONDS)  # figures that need no baseline


def small(case):
    """The case on the host with few tokens and narrow, and without torch.compile, which takes seconds."""
    against = tuple(name for name in case.against if name != "compiled")
    targets = tuple(target for target in case.targets if target.of in (*against, *OWN))
    size = {"width": 32} if isinstance(case, OpCase) else {"dim": 64}
    size |= {"tokens": 33, "batch": min(case.batch, 2), "device": "cpu", "clock": "host"}
    return dataclasses.replace(case, against=against, targets=targets, **size)


HOST = [case for case in CASES.values() if not isinstance(case, MemoryCase)]
DEVICE = [case for case in device_cases.CASES.values() if case.dtype == torch.bfloat16]  # every op and form
SMALL = list({(case.name, case.against): case for case in map(small, HOST + DEVICE)}.values())


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # takes longer than all else of a small case
    return HostClock(cache_bytes=1024)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_case_runs_and_passes_its_check(case, clock):
    result = case.measure(clock, ROUNDS, bandwidth=1e9)
    assert 0 <= result["check"]["error"] <= result["check"]["allowed"]
    assert result["failed"] == {}
    assert list(result["contenders"]) == [OURS, *case.against]
    for row in result["contenders"].values():
        assert 0 < row["min_ms"] <= row["median_ms"] and row["iqr_ms"] >= 0 and row["cold_median_ms"] > 0
        assert row["rounds"] == 2
        assert row.get("share_of_copy") == (row["bytes_per_second"] / 1e9 if case.bytes_moved else None)
    assert set(result["ratios"]) == set(result["cold_ratios"]) == set(case.against)
    assert all(target["reached"] in (True, False) for target in result["targets"])


@pytest.mark.parametrize("case", [case for case in SMALL if isinstance(case, OpCase)], ids=lambda case: case.name)
def test_bytes_moved_are_those_of_the_tensors(case):
    tensors = case.tensors()
    read = sum(tensor.nbytes for tensor in tensors.values())
    output = as_tuple(case.ours(**with_state(**tensors)))[0]
    state = sum(tensors[name].nbytes for name in ("total", "residual", "count")) if "total" in tensors else None
    written = {"state": 2 * output.nbytes + 8 * case.batch, "update": output.nbytes + (state or 0)}
    once = read + written.get(case.op, output.nbytes)
    constant = sum(tensors[name].nbytes for name in ("weight", "residual", "count") if name in tensors)
    gradients = 2 * read - constant + output.nbytes
    expected = {"forward": once, "backward": gradients, "both": once + gradients}[case.passes]
    assert case.bytes_moved == expected


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_baselines_compute_the_same(case):
    with torch.inference_mode(not case.differentiates):
        setup = case.setup()
        for name in set(SAME) & set(case.against):
            check(case, setup.contenders[name]().call(), setup.expected())


@pytest.mark.parametrize("form", ["product", "power"])
@pytest.mark.parametrize("degree", [1, 2, 5])
def test_plain_formula_is_the_definition(form, degree):
    u = torch.randn(2, 7, 3 * (degree if form == "product" else 1), dtype=torch.float64)
    coeff = torch.randn(3, degree, dtype=torch.float64) if form == "power" else None
    torch.testing.assert_close(
        baselines.features(u, coeff, form, degree), reference.features(u, coeff, form=form, degree=degree)
    )


def test_compiled_formula(clock):
    result = OpCase("state", "power", 2, 33, 32, passes="backward", against=("compiled",)).measure(clock, ROUNDS)
    assert result["failed"] == {} and "compiled" in result["ratios"]


def test_memory_is_that_of_one_call(clock):
    tokens, width = 8192, 256
    case = MemoryCase(OpCase("state", "power", 3, tokens, width), targets=(Target("state", at_most=10**6),))
    result = case.measure(clock, ROUNDS)
    assert result["bytes"] == {"state": 8 * width + 8, "u": 4 * tokens * width}
    plain, ours = (result["contenders"][name]["extra_bytes"] for name in ("plain", OURS))
    assert plain > 3 * result["bytes"]["u"]  # at least the powers, which torch.cat writes side by side
    assert ours < result["bytes"]["u"] / 4
    assert result["targets"][0]["measured"] == ours / result["bytes"]["state"]


def test_every_target_belongs_to_a_case():
    kept = [case.targets for case in CASES.values()]
    for targets in TARGETS.values():
        assert targets in kept
    for case in (*CASES.values(), *device_cases.CASES.values()):
        known = ("state", "u", "allowed") if isinstance(case, MemoryCase) else (*case.against, *OWN)
        assert all(target.of in known for target in case.targets)


def test_a_name_is_one_case():
    """Cases that share a name differ in baselines and targets alone, and keep those of both."""

    def bare(case):
        return dataclasses.replace(case, against=(), targets=())

    builders = (device_cases.kernel_cases, device_cases.update_cases, device_cases.authors_cases)
    listed = list(itertools.chain.from_iterable(builder() for builder in (*builders, device_cases.layer_cases)))
    for case in listed:
        kept = device_cases.CASES[case.name]
        assert bare(kept) == bare(case)
        assert set(case.targets) <= set(kept.targets) and set(case.against) <= set(kept.against)
    assert len({bare(case) for case in listed}) == len(device_cases.CASES)


def test_large_cases_are_held_against_the_copy():
    """All kernels with a bound, in all dtypes and both forms, at 64 MiB of tokens or more."""
    bounds = {("forward", 0.85), ("backward", 0.80)}
    found = set()
    for case in device_cases.CASES.values():
        for target in case.targets:
            if target.of == COPY_BANDWIDTH:
                assert (case.passes, target.at_least) in bounds
                assert case.batch * case.tokens * case.channels * case.dtype.itemsize >= 2**26
                found.add((case.op, case.passes, case.form, case.dtype))
    assert len(found) == 3 * 2 * 2 * 3


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


@pytest.fixture
def registry(monkeypatch):
    """Two small cases in place of those of the host."""
    cases = [
        OpCase("state", "power", 2, 33, 32, against=("plain", "sum"), targets=(Target("plain", at_least=1e9),)),
        OpCase("mix", "product", 2, 33, 32, against=("copy",)),
    ]
    monkeypatch.setitem(run.CASES, "cpu", {case.name: case for case in cases})
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

    monkeypatch.setitem(run.CASES, "cuda", {case.name: case for case in cases})
    monkeypatch.setattr(run, "require", lambda name: None)
    monkeypatch.setattr(device, "clocks", lambda: {name: Clock(1024) for name in ("events", "graph", "latency")})
    monkeypatch.setattr(device, "machine", lambda: {"gpu": "A GPU", "driver": "1.2.3", "cuda": "13.0"})
    monkeypatch.setattr(device, "copy_bandwidth", partial(device.copy_bandwidth, size=4096, device="cpu"))
    return cases


def test_command(registry, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "cores" in printed[0] and torch.__version__ in printed[0]
    assert any("≥ 1e+09 MISSED" in line for line in printed)
    assert "0 of 1 targets reached" in printed
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "settings", "cases", "wrong"}
    assert {"processor", "cores", "instruction_set", "threads", "torch", "commit", "date", "load"} <= set(
        content["machine"]
    )
    assert list(content["settings"]["cleared_bytes"]) == ["host"]
    assert [case["name"] for case in content["cases"]] == [case.name for case in registry]
    state = content["cases"][0]
    assert state["dtype"] == "float32" and state["kind"] == "time"
    assert state["shapes"] == {"u": [1, 33, 32], "coeff": [32, 2]}
    assert state["targets"][0]["reached"] is False and state["targets"][0]["measured"] == state["ratios"]["plain"]
    assert list(tmp_path.iterdir()) == [path]


def test_device_command(stand_in, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run.main(["--device", "cuda", "--json", str(path), "--predict", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("A GPU, driver 1.2.3, CUDA 13.0, ") and torch.__version__ in printed[0]
    assert printed[1].startswith("copy of 4.0 KiB: ")
    assert any("copy bandwidth ≥ 1e-09 reached, microseconds ≤ 0.001 MISSED" in line for line in printed)
    assert any("of copy" in line and "warm µs" in line for line in printed)
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "settings", "copy", "cases", "wrong"}
    assert content["machine"]["gpu"] == "A GPU" and content["copy"]["bytes_moved"] == 8192
    mix = content["cases"][0]
    assert (mix["clock"], mix["judged"], mix["bytes_moved"]) == ("graph", "cold", stand_in[0].bytes_moved)
    assert mix["predicted_us"] == mix["bytes_moved"] / 2e3
    row = mix["contenders"][OURS]
    assert row["bytes_per_second"] == pytest.approx(1e3 * mix["bytes_moved"] / row["median_ms"])
    assert row["share_of_copy"] == row["bytes_per_second"] / content["copy"]["bytes_per_second"]
    assert mix["targets"][0]["measured"] == row["share_of_copy"]
    assert mix["targets"][1]["measured"] == pytest.approx(1e3 * row["median_ms"])
    assert "warm_median_ms" in row and mix["warm_ratios"] == {}


def test_device_that_is_not_there(no_gpu):
    with pytest.raises(SystemExit, match="--device cuda: torch .* finds no GPU"):
        run.main(["--device", "cuda"])


def test_library_without_kernels_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "DEVICES", ("cpu",))
    with pytest.raises(SystemExit, match="--device cuda: the library was built without its kernels"):
        run.main(["--device", "cuda"])


def test_predictions_need_no_device(no_gpu, capsys):
    chosen = ("--case", "state-power3-N16384-*-bfloat16", "layer-*")
    assert run.main(["--device", "cuda", "--list", "--predict", "1000", *chosen]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["at", "1000", "GB/s", "bytes", "µs"]
    size = 2 * 16384 * 2048 + 4 * 2048 * 3 + 2 * 4 * 2048 + 8
    assert line.split() == ["state-power3-N16384-E2048-bfloat16", f"{size:,}", "67.1"]


def test_case_that_does_not_run(registry, monkeypatch, tmp_path, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops, "polynomial_state", broken)
    path = tmp_path / "results.json"
    assert run.main(["--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["wrong"] == [f"{registry[0].name}: RuntimeError: out of memory"]
    assert [case["name"] for case in content["cases"]] == [registry[1].name]


def test_quick_keeps_the_cases_with_targets(registry):
    (case,) = run.selected(run.CASES["cpu"], [], quick=True)
    assert case.name == registry[0].name and case.against == ("plain",)
    assert len(run.selected(run.CASES["cpu"], [], quick=True, also=["mix*"])) == 2


def test_cases_and_baselines_that_are_left_out(registry):
    (case,) = run.selected(run.CASES["cpu"], [], quick=False, without=["mix*"], against=["sum"])
    assert case.name == registry[0].name and case.against == ("sum",)


def test_list(registry, capsys):
    assert run.main(["--list", "--case", "mix*"]) == 0
    assert capsys.readouterr().out.split() == [registry[1].name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "nothing*"],
        ["--json", "no/folder/x.json"],
        ["--threads", "0"],
        ["--resume"],
        ["--limit", "0"],
        ["--quick", "--case", "mix*"],
        ["--predict", "3350"],  # of the host
        ["--predict", "0", "--device", "cuda"],
        ["--device", "tpu"],
    ],
)
def test_wrong_arguments(registry, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert arguments[0] in str(error.value) + capsys.readouterr().err


def test_wrong_results_are_not_timed(registry, monkeypatch, tmp_path, capsys):
    polynomial_state = ops.polynomial_state
    monkeypatch.setattr(ops, "polynomial_state", lambda u, *rest, **more: polynomial_state(2 * u, *rest, **more))
    path = tmp_path / "results.json"
    assert run.main(["--json", str(path)]) == 1
    assert f"WRONG {registry[0].name}: error" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [case["name"] for case in content["cases"]] == [registry[1].name]
    assert len(content["wrong"]) == 1


def test_baseline_that_does_not_run(registry, monkeypatch, clock):
    def broken(*arguments):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(baselines, "features", broken)
    result = registry[0].measure(clock, ROUNDS)
    assert result["failed"] == {"plain": "RuntimeError: not on this machine"}
    assert list(result["ratios"]) == ["sum"]
    assert result["targets"][0]["reached"] is None
    assert any("did not run: RuntimeError" in line for line in run.table(registry[0].name, result))
