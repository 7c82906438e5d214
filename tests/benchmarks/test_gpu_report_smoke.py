"""The programs that the GPU report runs: smoke tests of every family of kernels, and calls to profile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks.gpu_report import profiled, smoke
from benchmarks.gpu_report.families import FAMILIES
from benchmarks.gpu_report.read import Smoke


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_held_against_the_definition(family, device, capsys):
    assert smoke.main([family, "--device", device.type]) == 0
    assert capsys.readouterr().out.startswith("smoke ok: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_differs_from_the_definition_is_wrong(family, monkeypatch, capsys):
    name = "readout" if family in ("readout", "readout_backward", "folded") else "state"
    right = getattr(smoke.reference, name)

    def twice(*arguments, **more):
        found = right(*arguments, **more)
        return 2 * found if name == "readout" else (2 * found[0], found[1])

    monkeypatch.setattr(smoke.reference, name, twice)
    assert smoke.main([family, "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("smoke wrong: ") and "error" in told and told.count("\n") == 1


def test_calls_that_hang_are_ended():
    code = "import time; from benchmarks.gpu_report import smoke; "
    code += "smoke.polynomial_state = lambda *a, **b: time.sleep(600); "
    code += "smoke.main(['state', '--device', 'cpu', '--seconds', '3'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    reader = Smoke()
    for line in (done.stdout + done.stderr).splitlines():
        reader.line(line)
    assert reader.found(done.returncode) == {"outcome": "hung", "why": 'File "<string>", line 1 in <lambda>'}


def test_calls_that_raise_are_told(monkeypatch, capsys):
    def raises(*arguments, **more):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(smoke, "polynomial_state", raises)
    assert smoke.main(["state", "--device", "cpu"]) == 2
    assert capsys.readouterr().out == "smoke failed: RuntimeError: no kernel image is available\n"


def test_calls_are_made_ready_to_be_profiled(capsys):
    assert profiled.main(["--device", "cpu", "--small", "--without", "mix"]) == 0
    told = capsys.readouterr().out.split()[1::2]
    assert {"state", "state_product", "readout", "state_backward", "causal_mix", "update"} <= set(
        told
    ) and "mix" not in told


def test_a_call_that_raises_leaves_the_others(monkeypatch, capsys):
    calls = {"a": lambda: 1 / 0, "b": lambda: None, "c": lambda: torch.ones(1).sum}
    monkeypatch.setattr(profiled, "calls", lambda device, small: calls)
    assert profiled.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().out == "not profiled: a: ZeroDivisionError: division by zero\nprofiled c\n"
