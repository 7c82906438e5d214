"""The command line of video: train, stream, play, and what a mistake looks like."""

import subprocess
import sys

import av
import numpy as np
import pytest
from command import assert_fails, call
from PIL import Image

from pom_ext.models import VideoDiT
from pom_ext.models.checkpoint import load_model, read_checkpoint
from pom_ext.streaming import VideoStream

TINY = ["--dim", "16", "--layers", "1", "--heads", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    result = call("train", "--data", "moving-digits", "--frames", 4, "--steps", 2, "--patch", 7, "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    assert f"pom-ext stream {out}" in result.output
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    out = tmp_path_factory.mktemp("breakout")
    command = [
        "train",
        "--data",
        "game:breakout",
        "--frames",
        3,
        "--size",
        16,
        "--steps",
        2,
        "--patch",
        8,
        "--out",
        out,
    ]
    result = call(*command, "--context", "shared", *TINY)
    assert result.exit_code == 0, result.output
    return out / "model.safetensors"


def test_train_makes_a_model_of_the_videos(digits, game):
    model, settings = load_model(digits)
    assert isinstance(model, VideoDiT) and (model.patch, model.size, model.n_classes) == ((1, 7, 7), (28, 28), 10)
    assert settings["train"]["context"] == "clean" and settings["train"]["context_noise"] == 0.5
    assert settings["data"]["actions"] is False and model.positions == "space"
    model, settings = load_model(game)
    assert settings["data"]["classes"] == ["NOOP", "FIRE", "RIGHT", "LEFT"] and settings["data"]["actions"] is True
    assert settings["train"]["context"] == "shared" and model.in_channels == 3


def test_a_video_model_starts_from_an_image_model(tmp_path):
    images, video = tmp_path / "images", tmp_path / "video"
    assert call("train", "--steps", 1, "--out", images, *TINY).exit_code == 0
    start = [
        "--data",
        "moving-digits",
        "--frames",
        2,
        "--steps",
        1,
        "--batch-size",
        2,
        "--start",
        images / "model.safetensors",
    ]
    result = call("train", *start, "--out", video)
    assert result.exit_code == 0, result.output
    assert load_model(video / "model.safetensors")[0].dim == 16
    assert_fails(call("train", *start, "--out", tmp_path / "x", "--model", "S/2"), "start and model: ", "one of them")
    other = ["--data", "game:pong", *start[2:]]
    assert_fails(call("train", *other, "--out", tmp_path / "x"), "1 channels and 10 classes", "3 and 6")


def test_a_model_that_remembers_otherwise(tmp_path):
    memory = ["--read", "split", "--fade", "head", "--sink", 1, "--conv-frames", 1]
    learning = ["--context", "self", "--frames", 3, "--late-frames", 5, "--steps", 2, "--patch", 7]
    result = call("train", "--data", "moving-digits", "--out", tmp_path / "a", *memory, *learning, *TINY)
    assert result.exit_code == 0, result.output
    model, settings = load_model(tmp_path / "a" / "model.safetensors")
    config = model.config
    assert (config["read"], config["fade"], config["sink"], config["local_conv"]) == ("split", "head", 1, 1)
    assert settings["train"]["context"] == "self" and settings["data"]["late"]["shape"] == [1, 5, 28, 28]
    result = call("stream", tmp_path / "a" / "model.safetensors", "--frames", 3, "--out", tmp_path / "clip.gif")
    assert result.exit_code == 0, result.output

    def fails(*arguments):
        return call("train", "--data", "moving-digits", "--out", tmp_path / "x", *TINY, *arguments)

    assert_fails(fails("--fade", "head"), "fade: expected None, or with read='split'", "'head'")
    assert_fails(fails("--conv-frames", "1,x"), "conv-frames: expected a number or one per layer", "'1,x'")
    assert_fails(fails("--conv-frames", "1,0,0"), "local_conv: expected one for each of n_layers=1 layers, got 3")
    assert_fails(fails("--conv-frames", "3"), "local_conv: expected", "0 to 2", "got 3")
    assert_fails(fails("--conv-frames", "1", "--no-local-conv"), "conv-frames: ", "--no-local-conv")
    assert_fails(call("train", "--sink", 1, "--out", tmp_path / "x"), "sink: for video models only")
    assert_fails(call("train", "--late-frames", 9, "--out", tmp_path / "x"), "late-frames: for videos only")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_stream_writes_files(digits, name, tmp_path):
    result = call("stream", digits, "--out", tmp_path / name, "--frames", 3, "--steps", 1, "--labels", "3,8")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert f"3 frames in {tmp_path / name}" in result.stderr
    if name == "clip.mp4":
        with av.open(str(tmp_path / name)) as file:
            assert len(list(file.decode(video=0))) == 3
    else:
        with Image.open(tmp_path / name) as picture:
            assert getattr(picture, "n_frames", 1) == (3 if name == "clip.gif" else 1)


def test_stream_goes_to_standard_output_raw(digits):
    options = ["--out", "-", "--labels", "3", "--steps", "1"]
    command = [sys.executable, "-m", "pom_ext.cli", "stream", str(digits), *options]
    done = subprocess.run([*command, "--frames", "2"], capture_output=True, check=True)
    assert len(done.stdout) == 2 * 28 * 28 * 3
    model, settings = load_model(digits)
    from pom_ext.cli.common import trained_objective
    from pom_ext.media.frames import to_pixels

    stream = VideoStream(model, [3], steps=1, objective=trained_objective(settings))
    expected = b"".join(to_pixels(stream.next()[0, :, 0]).numpy().tobytes() for _ in range(2))
    assert done.stdout == expected
    assert b"remembers" in done.stderr

    endless = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # nobody reads on after a frame
    endless.stdout.read(28 * 28 * 3)
    endless.stdout.close()
    assert endless.wait(timeout=60) == 0, endless.stderr.read()
    assert b"Traceback" not in endless.stderr.read()


def test_a_kept_stream_goes_on(digits, tmp_path):
    options = ["--labels", "5", "--steps", 2, "--seed", 3, "--guidance", 1.5]
    assert call("stream", digits, "--out", tmp_path / "whole.png", "--frames", 4, *options).exit_code == 0
    kept = tmp_path / "kept.safetensors"
    assert call("stream", digits, "--out", tmp_path / "a.png", "--frames", 2, "--save", kept, *options).exit_code == 0
    assert call("stream", digits, "--out", tmp_path / "b.png", "--frames", 2, "--resume", kept).exit_code == 0
    whole, first, second = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("whole", "a", "b"))
    assert whole.shape == (28, 4 * 29 - 1, 3)
    assert np.array_equal(whole[:, : 2 * 29 - 1], first) and np.array_equal(whole[:, 2 * 29 :], second)
    assert read_checkpoint(kept)[1]["stream"]["frame"] == 2


def test_streams_and_games_in_a_window(digits, game, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    result = call("stream", digits, "--out", "window", "--labels", "1", "--frames", 2, "--steps", 1)
    assert result.exit_code == 0, result.output
    result = call("play", game, "--screen", "window", "--frames", 2, "--steps", 1)
    assert result.exit_code == 0 and "2 frames" in result.output


def test_play_follows_a_script_and_tells_the_times(game):
    result = call("play", game, "--screen", "none", "--actions", "FIRE,RIGHT*2,3", "--steps", 1, "--fps", 1000)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["FIRE", "RIGHT", "RIGHT", "LEFT"]
    assert "4 frames" in lines[-1] and "remembered" in lines[-1]


def test_stream_plays_actions(game, tmp_path):
    result = call("stream", game, "--out", tmp_path / "a.gif", "--actions", "FIRE,LEFT*2", "--frames", 4, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "a.gif").n_frames == 4


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (["stream", "CKPT", "--out", "clip.webm"], ["out: expected a name that ends in .mp4"]),
        (["stream", "CKPT", "--labels", "11"], ["labels: no class '11'"]),
        (["stream", "CKPT", "--frames", "0"], ["frames: expected at least 1, got 0"]),
        (["stream", "CKPT", "--actions", "UP"], ["actions: ", "is no model of actions", "--labels 0, 1"]),
        (["stream", "CKPT", "--size", "28"], ["size: expected height x width such as 48x64, got '28'"]),
        (["stream", "CKPT", "--size", "28x30"], ["size: expected multiples of the patch (7, 7), got 28 x 30"]),
        (["stream", "CKPT", "--resume", "nothing"], ["no file at nothing"]),
        (["stream", "CKPT", "--context-noise", "2"], ["context_noise: expected at least 0 and less than 1"]),
        (["stream", "CKPT", "--out", "window"], ["labels: a window shows one video, got 10"]),
        (["play", "GAME", "--actions", "JUMP"], ["actions: expected items such as NOOP*10, got 'JUMP'", "0 to 3"]),
        (["play", "GAME", "--frames", "0", "--screen", "none"], ["frames: expected at least 1"]),
        (["sample", "CKPT"], ["is a video model", "pom-ext stream"]),
        (["train", "--data", "game:chess960"], ["game: expected one of"]),
        (["train", "--data", "moving-digits", "--context", "both"], ["context: expected one of clean, shared"]),
    ],
)
def test_mistakes_are_one_line(arguments, texts, digits, game, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*(str({"CKPT": digits, "GAME": game}.get(argument, argument)) for argument in arguments))
    assert_fails(result, *texts)
    assert not list(tmp_path.iterdir())


def test_image_models_do_not_stream(tmp_path):
    assert call("train", "--steps", 1, "--out", tmp_path, *TINY).exit_code == 0
    for command in ("stream", "play"):
        assert_fails(call(command, tmp_path / "model.safetensors"), "is an image model", "pom-ext sample")


def test_frames_in_one_step(digits, tmp_path):
    """Trained so, and distilled from a model of many steps."""
    trained, distilled = tmp_path / "trained", tmp_path / "distilled"
    command = ["train", "--data", "moving-digits", "--frames", 4, "--patch", 7, "--objective", "meanflow", *TINY]
    result = call(*command, "--steps", 3, "--out", trained)
    assert result.exit_code == 0, result.output
    command = ["distill", digits, "--data", "moving-digits", "--guidance", 3, "--train-steps", 2, "--out", distilled]
    result = call(*command, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert f"pom-ext stream {distilled / 'model.safetensors'} --steps 1" in result.output
    assert_fails(call(*command), "model.safetensors exists; add --resume")
    endless = ["distill", digits, "--data", "moving-digits", "--steps", 2, "--out", tmp_path / "endless"]
    assert_fails(call(*endless), "train-steps, seconds: expected one of the two", "--steps are those of the solver")
    assert call(*command, "--resume").exit_code == 0
    assert_fails(call(*command, "--resume", "--steps", 2), "another distilled: draw_steps is 1, given 2")
    for out, guidance in ((trained, 2.0), (distilled, 3.0)):
        model, settings = load_model(out / "model.safetensors")
        assert model.config["two_times"] and settings["train"]["objective"] == "meanflow"
        assert settings["train"]["guidance"] == guidance and (out / "loss.png").exists()
        kept = out / "stream.safetensors"
        result = call(
            "stream", out / "model.safetensors", "--frames", 2, "--labels", 3, "--out", out / "a.png", "--save", kept
        )
        assert result.exit_code == 0, result.output
        assert VideoStream.load(kept, model).steps == 1
        for option, message in (("--out", "two_times: expected False"), ("--aoti", "a frame step has one time")):
            assert_fails(call("export", out / "model.safetensors", option, tmp_path / "x.pt2"), message)
    command[1] = distilled / "model.safetensors"
    assert_fails(call(*command[:-1], tmp_path / "again"), "objective: expected a model of flow matching")
    command[1] = digits
    assert_fails(call(*command[:-1], tmp_path / "again", "--steps", 3), "draw_steps: expected 1 or 2, got 3")
    assert not (tmp_path / "again").exists()
