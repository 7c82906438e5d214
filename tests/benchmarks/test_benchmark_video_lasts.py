"""The benchmark of streams that last: it trains alike, streams, measures and shows what it says."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks.suites import video_lasts
from pom_ext.demo.classifier import build_classifier
from pom_ext.demo.measures import ClipNet


@pytest.fixture
def small(monkeypatch):
    """Untrained judges, a small model, and streams of 24 frames, one for each digit."""
    judges = (build_classifier().eval(), ClipNet().eval(), {"classifier_accuracy_on_real_frames": 0.5})
    monkeypatch.setattr(video_lasts, "train_judges", lambda length: judges)
    model = {"patch": 7, "dim": 16, "n_layers": 1, "n_heads": 2, "mixer": "power"}
    sampling = {**video_lasts.SAMPLING, "steps": 1}
    for name, value in {"MODEL": model, "SAMPLING": sampling, "FRAMES": 24, "PER_DIGIT": 1}.items():
        monkeypatch.setattr(video_lasts, name, value)


def test_every_seed_and_mixer_is_trained_and_streamed(small, tmp_path, capsys):
    result = tmp_path / "result.json"
    arguments = ["--seeds", "0", "4", "--seconds", "0.05", "0.05", "--attention"]
    assert video_lasts.main([*arguments, "--pictures", str(tmp_path / "shown"), "--json", str(result)]) == 0
    content = json.loads(result.read_text())
    assert content["training_seconds"] == [0.05, 0.05] and content["memory"]["read"] == "split"
    for group in ("seeds", "attention"):
        assert [row["seed"] for row in content[group]] == [0, 4]
        for row in content[group]:
            assert row["steps"] > 0 and row["image_steps"] > 0
            assert [part["frames"] for part in row["by_length"]] == [[0, 8], [8, 24]]
            assert all(part["frechet"] > part["frechet_real"] for part in row["by_length"])
    assert content["attention"][0]["bytes_per_video"] != content["seeds"][0]["bytes_per_video"]
    assert content["seeds"][0]["by_length"] != content["seeds"][1]["by_length"]
    names = [f"{mixer}-{seed}" for mixer in ("power", "attention") for seed in (0, 4)]
    shown = {path.name for path in (tmp_path / "shown").iterdir()}
    assert shown == {f"{name}.{ending}" for name in names for ending in ("png", "gif")}
    assert capsys.readouterr().out.count("frames   8 to  24: read") == 4


def test_mistakes():
    with pytest.raises(SystemExit):
        video_lasts.main(["--json", "/nowhere/result.json"])
    with pytest.raises(SystemExit):
        video_lasts.main(["--seconds", "3"])
