"""The benchmark of torch.compile: it measures what it says, compares results first, and judges by its bound."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import compiled
from benchmarks.timing import Settings

BRIEF = Settings(0.1, 5, 50)


def test_cases(tmp_path, capsys):
    result = tmp_path / "result.json"
    arguments = ["--backend", "aot_eager", "--case", "power, 256", "--seconds", "0.1", "--json", str(result)]
    assert compiled.main(arguments) == 0
    cases = json.loads(result.read_text())["cases"]
    assert [case["case"] for case in cases] == [f"layer, power, 256 tokens, {passes}" for passes in compiled.PASSES]
    for case in cases:
        assert set(case["ratios"]) == {"compiled"} and set(case["median_ms"]) == {"eager", "compiled"}
        assert case["rounds"] >= 3
    forward, backward = (case["median_ms"]["eager"] for case in cases)
    assert forward < backward
    assert "x eager mode" in capsys.readouterr().out


class Module(torch.nn.Linear):
    """Compiled or not it differs, by how often it multiplies or by what it gives."""

    slower, wrong = 1, 0.0

    def forward(self, x):
        times = self.slower if torch.compiler.is_compiling() else 1
        return sum(super(Module, self).forward(x) for _ in range(times)) / times + (self.wrong if times > 1 else 0)


@pytest.mark.parametrize("bound, verdict", [(1000, "reached"), (4, "MISSED")])
def test_the_verdict(bound, verdict, monkeypatch, capsys):
    """Of a product that is made to take about twenty times as long."""
    monkeypatch.setattr(compiled, "BOUND", bound)
    module = Module(512, 512)
    module.slower = 20
    result = compiled.measure("product", "forward", module, (torch.randn(64, 512),), BRIEF, "aot_eager")
    assert verdict in capsys.readouterr().out and result["ratios"]["compiled"] > 4


@pytest.mark.parametrize("passes", compiled.PASSES)
def test_other_results_are_not_timed(passes):
    module = Module(16, 16)
    module.slower, module.wrong = 2, 0.1
    with pytest.raises(AssertionError, match="product: compiled it gives something else"):
        compiled.measure("product", passes, module, (torch.randn(4, 16),), BRIEF, "aot_eager")


@pytest.mark.parametrize(
    "name", [name for name in compiled.cases() if "256 tokens" in name or "power, batch 2, backward" in name]
)
def test_every_case_runs(name):
    build, *details = compiled.cases()[name]
    passes, module, given = build(*details)
    results = compiled.timed(passes, module, module, given)()
    assert len(results) == (1 if passes == "forward" else 1 + len(list(module.parameters())))
    assert all(result.isfinite().all() and result.any() for result in results)


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        compiled.main(["--case", "nothing like it"])
    assert "nothing is called" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compiled.main(["--json", "/nowhere/result.json"])
    assert "there is no folder" in capsys.readouterr().err
