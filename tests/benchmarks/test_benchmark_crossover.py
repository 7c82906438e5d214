"""The benchmark of where each form wins: what it measures, what it leaves out and says so, and the break-even."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import crossover


def test_a_run(tmp_path, capsys):
    result, plot = tmp_path / "result.json", tmp_path / "plot.png"
    arguments = ["--what", "layer", "--sizes", "S/2", "--tokens", "64", "256", "--seconds", "0.01"]
    assert crossover.main([*arguments, "--json", str(result), "--plot", str(plot)]) == 0
    content = json.loads(result.read_text())
    assert [case["passes"] for case in content["cases"]] == list(crossover.PASSES)
    for case in content["cases"]:
        assert set(case["seconds"]) == {*crossover.FORMS, "attention"}
        assert all(value > 0 for seconds in case["seconds"].values() for value in seconds)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "faster than attention from" in capsys.readouterr().out


def test_what_would_take_too_long_is_not_measured(capsys):
    options = type("Options", (), {"tokens": (16, 64), "seconds": 0.0, "limit": 0.0})
    seconds = crossover.measure("model", "S/2", crossover.Models("S/2"), "forward", options)
    assert all(first > 0 and second is None for first, second in seconds.values())
    assert "attention not measured" in capsys.readouterr().out


def test_models_have_the_layers_that_they_are_named_after():
    models = crossover.Models("S/2")
    for name, form in crossover.FORMS.items():
        model = models.named(name)
        for mixer in (block.mixer for block in model.blocks):
            assert (mixer.form, mixer.degree) == (form["form"], form["degree"])
            assert mixer.n_sel_heads == (6 if "heads" in form else 1)
        assert model(*models.inputs(16)).shape == (1, 4, 8, 8)
    assert all(hasattr(block.mixer, "qkv") for block in models.named("attention").blocks)
    assert model(*models.inputs(16)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("ours, theirs, expected", [
    ([1, 2, 3], [2, 3, 4], 4), ([3, 2, 3], [2, 3, 4], 8), ([1, 4, 3], [2, 3, 4], 16), ([3, 4, 5], [2, 3, 4], None),
    ([3, 2, None], [2, 3, 4], 8), ([1, 4, None], [2, 3, 4], None),
])  # fmt: skip
def test_break_even(ours, theirs, expected):
    assert crossover.break_even((4, 8, 16), ours, theirs) == expected


def test_what_is_kept_of_a_token():
    dim, kept = 64, {}
    for name in ("attention", *crossover.FORMS):
        for memory in ("store", "recompute"):
            layer = crossover.make_layer(name, dim, 4)
            layer.memory = memory
            kept[name, memory] = crossover.kept_bytes(layer, torch.randn(1, 1000, dim, requires_grad=True)) / (4 * dim)
    assert kept["attention", "store"] > 4  # queries, keys, values and what is read of them
    assert 2 <= kept["power, heads", "store"] < 2.5 and kept["power, heads", "recompute"] < 0.5  # u; gates
    assert 4 <= kept["power", "store"] < 4.5 and kept["power", "recompute"] < 0.5  # u and gates
    assert 8 <= kept["product", "store"] < 8.5 and kept["product", "recompute"] < 0.5
