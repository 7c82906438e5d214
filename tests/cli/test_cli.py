"""The command line: every subcommand once, and what a mistake looks like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import assert_fails, call
from PIL import Image
from setuptools.config.pyprojecttoml import read_configuration

from pom_ext.models.checkpoint import read_checkpoint

TINY = ["--patch", "4", "--dim", "16", "--layers", "2", "--heads", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (root / name).mkdir()
        for i in range(4):
            Image.new("RGB", (9 + i, 8), color).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    result = call("train", "--data", pictures, "--size", 8, "--steps", 3, "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    return out


def test_train_leaves_checkpoint_and_loss_curve(trained):
    assert {path.name for path in trained.iterdir()} == {"model.safetensors", "loss.png"}
    settings = read_checkpoint(trained / "model.safetensors")[1]
    assert settings["step"] == 3 and settings["data"]["classes"] == ["blue", "red"]
    assert settings["model"]["mixer"] == "power" and settings["train"]["shift"] == 0.25
    assert Image.open(trained / "loss.png").size[0] > 300


def test_train_resumes_and_does_not_overwrite(pictures, trained, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    (out / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    command = ["train", "--data", pictures, "--size", 8, "--out", out, *TINY]
    assert_fails(call(*command, "--steps", 5), "model.safetensors exists", "--resume")
    assert_fails(call(*command, "--steps", 5, "--resume", "--lr", "0.5"), "lr is 0.025", "given 0.5")
    assert read_checkpoint(out / "model.safetensors")[1]["step"] == 3
    assert call(*command, "--steps", 5, "--resume").exit_code == 0
    assert read_checkpoint(out / "model.safetensors")[1]["step"] == 5


def test_train_takes_hybrids_standard_sizes_and_noise_prediction(pictures, tmp_path):
    command = ["train", "--data", pictures, "--size", 8, "--steps", 1, *TINY]
    result = call(*command, "--out", tmp_path / "a", "--mixer", "product,attention", "--objective", "noise", "--bf16")
    assert result.exit_code == 0, result.output
    settings = read_checkpoint(tmp_path / "a" / "model.safetensors")[1]
    assert settings["model"]["mixer"] == ["product", "attention"] and settings["train"]["objective"] == "noise"
    result = call(*command, "--out", tmp_path / "b", "--model", "S/8", "--no-local-conv")
    assert result.exit_code == 0, result.output
    model = read_checkpoint(tmp_path / "b" / "model.safetensors")[1]["model"]
    assert (model["patch"], model["dim"], model["local_conv"]) == (4, 16, False), "options go before those of the size"
    assert (
        call("sample", tmp_path / "a" / "model.safetensors", "--out", tmp_path / "a.png", "--steps", 2).exit_code == 0
    )


def test_images_in_one_step(pictures, tmp_path):
    command = ["train", "--data", pictures, "--size", 8, "--objective", "meanflow", "--steps", 3, *TINY]
    result = call(*command, "--out", tmp_path, "--guidance", 1.5)
    assert result.exit_code == 0, result.output
    checkpoint = tmp_path / "model.safetensors"
    settings = read_checkpoint(checkpoint)[1]
    assert settings["model"]["two_times"] and settings["train"]["guidance"] == 1.5
    assert call("sample", checkpoint, "--out", tmp_path / "a.png").exit_code == 0
    failed = call("sample", checkpoint, "--out", tmp_path / "b.png", "--guidance", 3)
    assert_fails(failed, "guidance: expected 1, for it is trained into a MeanFlow model, got 3.0")


def test_sample_draws_a_grid(trained, tmp_path):
    checkpoint = trained / "model.safetensors"
    result = call("sample", checkpoint, "--out", tmp_path / "a.png", "--steps", 2, "--per-label", 3)
    assert result.exit_code == 0, result.output
    assert "6 images" in result.output
    one = call(
        "sample",
        checkpoint,
        "--out",
        tmp_path / "b.png",
        "--steps",
        2,
        "--labels",
        "red",
        "--size",
        16,
        "--solver",
        "heun",
    )
    assert one.exit_code == 0, one.output
    first, second = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert first.size[0] / first.size[1] < second.size[0] / second.size[1], "two rows of three, one row of eight"


def test_sample_names_mistakes(trained, tmp_path):
    checkpoint, out = trained / "model.safetensors", tmp_path / "a.png"
    assert_fails(call("sample", checkpoint, "--out", out, "--labels", "red,green"), "no class 'green'", "blue, red")
    assert_fails(call("sample", checkpoint, "--out", out, "--labels", "2"), "no class '2'", "0 to 1")
    assert_fails(call("sample", checkpoint, "--out", out, "--steps", 0), "steps")
    assert_fails(call("sample", checkpoint, "--out", out, "--size", 10), "multiples of the patch size 4")
    assert_fails(call("sample", checkpoint, "--out", out, "--per-label", 0), "per-label")
    assert_fails(call("sample", checkpoint, "--out", out, "--device", "tpu"), "device", "tpu")
    assert_fails(call("sample", tmp_path / "none.safetensors", "--out", out), "no file at")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(checkpoint.read_bytes()[:500])
    assert_fails(call("sample", broken, "--out", out), "broken.safetensors is truncated")
    assert not out.exists()


def test_train_names_mistakes(pictures, tmp_path):
    out = tmp_path / "out"
    command = ["train", "--out", out, "--steps", 1, *TINY]
    assert_fails(call(*command, "--data", tmp_path / "nowhere", "--size", 8), "nowhere", "not a folder")
    assert_fails(call(*command, "--data", pictures), "size: needed")
    assert_fails(call(*command, "--data", pictures, "--size", 10), "image_size", "multiple of patch=4")
    assert_fails(call(*command, "--data", pictures, "--size", 8, "--mixer", "magic"), "mixer", "magic")
    assert_fails(call(*command, "--data", pictures, "--size", 8, "--model", "XXL/2"), "XXL/2")
    assert_fails(call(*command, "--data", pictures, "--size", 8, "--objective", "score"), "objective", "score")
    assert_fails(call(*command, "--data", pictures, "--size", 8, "--lr", 0), "lr")
    assert_fails(call(*command, "--data", pictures, "--size", 8, "--resume"), "no file at")
    assert_fails(call("train", "--data", pictures, "--size", 8, "--out", out, *TINY), "steps, seconds")
    assert not out.exists()


def test_an_interrupted_train_says_how_to_go_on(pictures, tmp_path, monkeypatch):
    from pom_ext.training.trainer import Trainer

    step = Trainer.step

    def interrupted(self, *arguments):
        if len(self.losses) == 2:
            raise KeyboardInterrupt
        step(self, *arguments)

    command = ["train", "--data", pictures, "--size", 8, "--steps", 3, "--out", tmp_path, "--save-every", 2, *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result = call(*command)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert call(*command, "--resume").exit_code == 0


def test_demo_writes_all_its_files(tmp_path, monkeypatch):
    """The whole demo with hardly any training: the report must tell the truth about unreadable samples, too."""
    from pom_ext.demo import images, run_demo, video

    monkeypatch.setattr(images, "SAMPLING", {"steps": 2, "guidance": 1.0, "solver": "euler"})
    monkeypatch.setattr(video, "SAMPLING", {**video.SAMPLING, "steps": 1})
    monkeypatch.setattr(video, "COSTS", 6)
    monkeypatch.setattr(video, "STREAM", 26)
    report = run_demo(tmp_path, image_seconds=0.5, video_seconds=0.5, per_class=10, streams=1)
    expected = {"samples.png", "loss.png", "model.safetensors", "report.md", "report.json", "video.safetensors"}
    expected |= {"video_loss.png", "video.png", "video.gif", "video.mp4", "stream.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert json.loads((tmp_path / "report.json").read_text()) == report
    text = (tmp_path / "report.md").read_text()
    pictures, clips = report["images"], report["video"]
    assert pictures["classifier_accuracy_on_real_images"] >= 0.97
    assert pictures["samples_read_as_requested"] < 0.9, "half a second of training draws no digits"
    assert clips["classifier_accuracy_on_real_frames"] >= 0.9
    assert clips["read_at_twice_the_trained_length"] < 0.9
    for share in (pictures["samples_read_as_requested"], clips["read_within_the_trained_length"]):
        assert f"{share:.1%}" in text
    costs = clips["costs"]
    assert len(set(costs["PoM"]["bytes"])) == 1 and len(set(costs["attention"]["bytes"])) == 6
    assert Image.open(tmp_path / "samples.png").size[0] > 600
    with Image.open(tmp_path / "video.gif") as gif:
        assert gif.n_frames == 13 and clips["stream"]["frames"] == len(clips["frames_read_as_requested"]) == 26
    assert [row["frames"] for row in clips["by_length"]] == [[0, 8], [8, 24]]
    assert clips["clip_net_on_real_clips"]["digit"] >= 0.9
    for row in clips["by_length"]:
        assert row["frechet"] > 2 * row["frechet_real"] and 0.4 < row["speed_real"] < 1
        assert f"| {row['frames'][0]} to {row['frames'][1]} | {row['read']:.1%} | {row['speed']:.2f} (" in text


def test_bench_runs_the_source_trees_benchmarks(monkeypatch, tmp_path):
    from pom_ext.cli import tools

    monkeypatch.setattr(tools, "__file__", str(tmp_path / "pom_ext" / "cli" / "tools.py"))
    assert_fails(call("bench"), "no ", "benchmarks/run.py")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # before the one of a source tree on PYTHONPATH
    (tmp_path / "benchmarks" / "run.py").write_text("import sys; sys.exit(len(sys.argv))")
    assert call("bench", "--case", "forward").exit_code == 3, "arguments and exit code are passed on"


def test_doctor_tells_what_is_here():
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for text in (torch.__version__, sys.version.split()[0], "loaded", "threads", "engine     loaded"):
        assert text in result.output


def test_doctor_asks_for_what_the_extras_install():
    from pom_ext.cli.doctor import PLAYING, TRAINING

    root = Path(__file__).parents[2]
    extras = read_configuration(root / "pyproject.toml", expand=False)["project"]["optional-dependencies"]
    modules = {
        extra: {{"pillow": "PIL", "ale-py": "ale_py"}.get(name, name) for name in extras[extra]} for extra in extras
    }
    assert modules["train"] == set(TRAINING) and modules["play"] == {*PLAYING, "PIL"}


def test_doctor_explains_which_implementation_a_call_takes():
    few, many = (call("doctor", "--explain", "dim=64", "heads=4", f"tokens={tokens}").output for tokens in (1, 500))
    assert "layer readout: streamed projection" in few and "    not folded into the output projection: " in few
    assert "layer readout: folded into the output projection" in many
    frames = call("doctor", "--explain", "dim=64", "heads=4", "tokens=500", "mode=frames")
    assert frames.exit_code == 0 and "layer readout: " in frames.output
    causal = call("doctor", "--explain", "form=product", "dim=32", "heads=1", "tokens=9", "mode=causal", "train=yes")
    assert causal.exit_code == 0 and causal.output.splitlines()[1:] == ["layer: one operation"]


@pytest.mark.parametrize(
    "words, parts",
    [
        (("--explain", "width=3"), ("width=3", "NAME=VALUE", "dim, degree")),
        (("--explain", "tokens=0"), ("tokens", "a positive integer", "0")),
        (("--explain", "mode=sideways"), ("mode", "causal", "sideways")),
        (("--explain", "dtype=int8"), ("dtype", "bfloat16", "int8")),
        (("--explain", "heads=5"), ("n_sel_heads", "768", "5")),
        (("dim=64",), ("dim=64", "--explain")),
    ],
    ids=str,
)
def test_doctor_explains_what_is_wrong_with_a_setting(words, parts):
    assert_fails(call("doctor", *words), *parts)


def test_doctor_fails_if_something_does_not_fit(monkeypatch, tmp_path):
    from pom_ext.cli import doctor
    from pom_ext.ops import _library

    monkeypatch.setattr(
        doctor, "diagnose", lambda: iter(("torch      2.13", "mismatch   built for another: build again"))
    )
    result = call("doctor")
    assert result.exit_code == 1 and result.output.endswith("mismatch   built for another: build again\n")
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    for text in (None, "{", "\x00"):
        if text is not None:
            (tmp_path / "_build.json").write_text(text)
        assert _library.build_note() == {}


def test_doctor_prints_why_the_library_does_not_load(monkeypatch):
    from pom_ext.ops import _library

    monkeypatch.setattr(_library, "ERROR", "no compiled library: build it")
    result = call("doctor")
    assert result.exit_code == 1
    assert "not loaded: ImportError: no compiled library: build it" in result.output


def test_help_and_import_are_light():
    """Neither importing the package nor asking for help loads what only training needs."""
    heavy = {"torch", "diffusers", "accelerate", "matplotlib", "mlxtend", "PIL", "sklearn", "av", "ale_py", "pygame"}
    code = f"import sys, pom_ext, pom_ext.cli; print({heavy | {'starlette'}} & set(sys.modules) or 'light')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "light\n"
    result = call("--help")
    assert result.exit_code == 0
    for name in ("demo", "train", "sample", "stream", "play", "export", "bench", "doctor"):
        assert name in result.output
