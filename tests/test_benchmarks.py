"""The benchmarks: every registered case at a small size passes its own check, and the results are as documented."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from pom_ext import reference

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no part of the installed package

from benchmarks import baselines, ops, run
from benchmarks.cases import CASES, TARGETS
from benchmarks.measure import OURS, Target, check
from benchmarks.ops import MemoryCase, OpCase
from benchmarks.timing import Contender, HostClock, Settings, interleave, ratios, summary

ROUNDS = Settings(seconds=0, least_rounds=2)
SAME = ("plain", "cumsum", "float32")  # baselines that compute what the case does


def small(case):
    """The case with few tokens and narrow, and without torch.compile, which takes seconds."""
    against = tuple(name for name in case.against if name != "compiled")
    size = {"width": 32} if isinstance(case, OpCase) else {"dim": 64}
    return dataclasses.replace(case, tokens=33, against=against, **size)


SMALL = list(
    {case.name: case for case in map(small, (c for c in CASES.values() if not isinstance(c, MemoryCase)))}.values()
)


@pytest.fixture
def clock():
    return HostClock(cache_bytes=1024)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_case_runs_and_passes_its_check(case, clock):
    result = case.measure(clock, ROUNDS)
    assert 0 <= result["check"]["error"] <= result["check"]["allowed"]
    assert result["failed"] == {}
    assert list(result["contenders"]) == [OURS, *case.against]
    for row in result["contenders"].values():
        assert 0 < row["min_ms"] <= row["median_ms"] and row["iqr_ms"] >= 0 and row["cold_median_ms"] > 0
        assert row["rounds"] == 2
    assert set(result["ratios"]) == set(result["cold_ratios"]) == set(case.against)
    assert all(target["reached"] in (True, False) for target in result["targets"])


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
    result = OpCase("state_backward", "power", 2, 33, 32, against=("compiled",)).measure(clock, ROUNDS)
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
    for case in CASES.values():
        known = ("state", "u") if isinstance(case, MemoryCase) else case.against
        assert all(target.of in known for target in case.targets)


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
    assert ratios(times, "ours") == {"other": (0.5, 1.0)}
    row = summary(times["other"], bytes_moved=4)
    assert row == {
        "median_ms": 2e3, "min_ms": 1e3, "iqr_ms": 1e3, "cold_median_ms": 2e3, "rounds": 3, "bytes_per_second": 2.0,
    }  # fmt: skip


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
    """Two small cases in place of the registered ones."""
    cases = [
        OpCase("state", "power", 2, 33, 32, against=("plain", "sum"), targets=(Target("plain", at_least=1e9),)),
        OpCase("mix", "product", 2, 33, 32, against=("copy",)),
    ]
    monkeypatch.setattr(run, "CASES", {case.name: case for case in cases})
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
    assert [case["name"] for case in content["cases"]] == [case.name for case in registry]
    state = content["cases"][0]
    assert state["dtype"] == "float32" and state["kind"] == "time"
    assert state["shapes"] == {"u": [1, 33, 32], "coeff": [32, 2]}
    assert state["targets"][0]["reached"] is False and state["targets"][0]["measured"] == state["ratios"]["plain"]
    assert list(tmp_path.iterdir()) == [path]


def test_quick_keeps_the_cases_with_targets(registry):
    (case,) = run.selected([], quick=True)
    assert case.name == registry[0].name and case.against == ("plain",)


def test_list(registry, capsys):
    assert run.main(["--list", "--case", "mix*"]) == 0
    assert capsys.readouterr().out.split() == [registry[1].name]


@pytest.mark.parametrize(
    "arguments",
    [["--case", "nothing*"], ["--json", "no/folder/x.json"], ["--threads", "0"], ["--quick", "--case", "mix*"]],
)
def test_wrong_arguments(registry, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert arguments[0] in str(error.value) + capsys.readouterr().err


def test_wrong_results_are_not_timed(registry, monkeypatch, tmp_path, capsys):
    polynomial_state = ops.polynomial_state
    monkeypatch.setattr(ops, "polynomial_state", lambda u, **rest: polynomial_state(2 * u, **rest))
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
