"""The benchmark of derivatives in a direction: it measures what it says, and judges by its bound."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import forward_mode
from benchmarks.timing import Settings


def test_a_case(tmp_path, capsys):
    result = tmp_path / "result.json"
    arguments = ["--case", "layer, power, 256 tokens", "--seconds", "0.1", "--json", str(result)]
    assert forward_mode.main(arguments) == 0
    (case,) = json.loads(result.read_text())["cases"]
    assert case["case"] == "layer, power, 256 tokens" and set(case["ratios"]) == {"ours", "torch"}
    assert case["ratios"]["ours"] > 1 and case["rounds"] >= 3 and set(case["median_ms"]) == {"forward", "ours", "torch"}
    assert "x the forward" in capsys.readouterr().out


@pytest.mark.parametrize("slower, verdict", [(1, "reached"), (60, "MISSED")])
def test_the_verdict(slower, verdict, monkeypatch, capsys):
    """By a derivative that is made to take so many times as long."""

    def jvp(function, at, direction):
        for _ in range(slower):
            function(*at)

    monkeypatch.setattr(forward_mode, "jvp", jvp)
    weight = torch.randn(256, 256)
    forward_mode.measure("product", lambda x: x @ weight, (torch.randn(256, 256),), Settings(0.1, 5, 50))
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize("name", forward_mode.cases())
def test_every_case_runs(name):
    build, *details = forward_mode.cases()[name]
    function, at = build(*details)
    with torch.no_grad():
        value, tangent = forward_mode.jvp(function, at, at)
    assert value.shape == tangent.shape and tangent.norm() > 0


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        forward_mode.main(["--case", "nothing like it"])
    assert "nothing is called" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        forward_mode.main(["--json", "/nowhere/result.json"])
    assert "there is no folder" in capsys.readouterr().err
