"""The benchmark of images in one step: it draws, measures and shows what it says."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import one_step
from pom_ext.demo.classifier import build_classifier


def test_both_ways_are_trained_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(one_step, "train_classifier", lambda images, labels: (build_classifier().eval(), 0.5))
    monkeypatch.setattr(one_step, "PER_DIGIT", 3)
    ways = {"meanflow": [{"steps": 1}], "flow": [{"steps": 2, "guidance": 2.0}]}
    monkeypatch.setattr(one_step, "SAMPLING", ways)
    result = tmp_path / "result.json"
    assert one_step.main(["--steps", "3", "--out", str(tmp_path), "--json", str(result)]) == 0
    content = json.loads(result.read_text())
    assert content["training_steps"] == 3 and content["classifier_accuracy_on_real_images"] == 0.5
    assert [(case["objective"], case["steps"]) for case in content["cases"]] == [("meanflow", 1), ("flow", 2)]
    assert all(case["read_as_requested"] < 0.5 and case["ms_an_image"] > 0 for case in content["cases"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"meanflow-1-in.png", "flow-2-2.0.png"}
    assert capsys.readouterr().out.count("read as requested") == 2


def test_spread_is_within_a_class():
    labels = torch.tensor([0, 0, 1, 1])
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    assert one_step.spread(images, labels) == 0
    images = images + torch.tensor([1.0, -1, 1, -1]).view(-1, 1, 1, 1)
    assert one_step.spread(images, labels) == pytest.approx(2**0.5)


def test_mistakes():
    with pytest.raises(SystemExit):
        one_step.main(["--json", "/nowhere/result.json"])
