"""The benchmarks: every registered case at a small size passes its own check, and the results are as documented."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch

from pom_ext.ops import reference

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.harness import baselines
from benchmarks.harness.measure import COPY_BANDWIDTH, MICROSECONDS, OURS, Target, as_tuple, check
from benchmarks.harness.memory_case import MemoryCase
from benchmarks.harness.op_case import OpCase, with_state
from benchmarks.harness.timing import Settings
from benchmarks.suites import core, layers, ops

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


HOST = [case for case in core.CASES["cpu"].values() if not isinstance(case, MemoryCase)]
DEVICE = [case for case in core.CASES["cuda"].values() if case.dtype == torch.bfloat16]  # every op and form
SMALL = list({(case.name, case.against): case for case in map(small, HOST + DEVICE)}.values())


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
    kept = [case.targets for case in core.CASES["cpu"].values()]
    for targets in ops.TARGETS.values():
        assert targets in kept
    for case in (*core.CASES["cpu"].values(), *core.CASES["cuda"].values()):
        known = ("state", "u", "allowed") if isinstance(case, MemoryCase) else (*case.against, *OWN)
        assert all(target.of in known for target in case.targets)


def test_a_name_is_one_case():
    """Cases that share a name differ in baselines and targets alone, and keep those of both."""

    def bare(case):
        return dataclasses.replace(case, against=(), targets=())

    builders = (ops.kernel_cases, ops.update_cases, ops.authors_cases, layers.device_cases)
    listed = list(itertools.chain.from_iterable(builder() for builder in builders))
    for case in listed:
        kept = core.CASES["cuda"][case.name]
        assert bare(kept) == bare(case)
        assert set(case.targets) <= set(kept.targets) and set(case.against) <= set(kept.against)
    assert len({bare(case) for case in listed}) == len(core.CASES["cuda"])


def test_large_cases_are_held_against_the_copy():
    """All kernels with a bound, in all dtypes and both forms, at 64 MiB of tokens or more."""
    bounds = {("forward", 0.85), ("backward", 0.80)}
    found = set()
    for case in core.CASES["cuda"].values():
        for target in case.targets:
            if target.of == COPY_BANDWIDTH:
                assert (case.passes, target.at_least) in bounds
                assert case.batch * case.tokens * case.channels * case.dtype.itemsize >= 2**26
                found.add((case.op, case.passes, case.form, case.dtype))
    assert len(found) == 3 * 2 * 2 * 3
