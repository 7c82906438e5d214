"""What is wrong with a stream or its file, and a stream that stands where it stood after an error."""

import json
import struct

import pytest
import torch
from stream_cases import CONTEXT, draw, same
from video_cases import HYBRID, small

from pom_ext.diffusion import NoisePrediction
from pom_ext.streaming import VideoStream


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"context": "noisy"}, ValueError, "context: expected one of clean, shared, got 'noisy'"),
        ({"steps": 0}, ValueError, "steps: expected at least 1"),
        ({"solver": "rk4"}, ValueError, "solver: expected one of"),
        ({"solver": "heun", "objective": NoisePrediction()}, ValueError, "solver: 'heun' is for flow matching"),
        ({"labels": [0.5]}, ValueError, "labels: expected one integer for each of 1 videos, got torch.float32"),
        ({"labels": [0, 1], "batch": 3}, ValueError, r"each of 3 videos, got torch.int64 \(2,\)"),
        ({"size": (4, 5)}, ValueError, "size: expected multiples of the patch"),
        ({"context_noise": 1.0}, ValueError, "context_noise: expected at least 0 and less than 1, .* got 1.0"),
        ({"context_noise": 0.1, "context": "shared"}, ValueError, "context_noise: .* with context='clean', got 0.1"),
        ({"window": -1}, ValueError, "window: expected an integer of at least 0"),
    ],
)
def test_bad_streams_are_named(options, error, message):
    with pytest.raises(error, match=message):
        VideoStream(small(n_classes=4), **{"labels": [0], **options})


def test_what_is_no_video_model_is_named():
    with pytest.raises(TypeError, match="model: expected a VideoDiT, got Linear"):
        VideoStream(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="guidance: a model without classes and text draws with guidance=1 only"):
        VideoStream(small(), guidance=2.0)


@CONTEXT
def test_after_an_error_the_stream_stands_at_its_last_good_frame(context):
    model = small(n_classes=4)  # positions end after six frames
    stream = VideoStream(model, [0, 1], context=context, steps=2)
    drawn = draw(stream, 5)
    kept = stream.fork()
    frame = torch.zeros(2, 3, 2, 4, 6)
    for wrong, error, message in [
        (lambda: stream.next([0, 5]), ValueError, r"labels: expected 0 to 4 \(no class\), got values from 0 to 5"),
        (
            lambda: stream.next([0, 1, 2]),
            ValueError,
            r"labels: expected one integer for each of 2 videos, got .*\(3,\)",
        ),
        (lambda: stream.next(frames=0), ValueError, "frames: expected 1, or more with context='shared', got 0"),
        (
            lambda: stream.prefill(frame[:1]),
            ValueError,
            r"video: expected 2 videos \(B, C, T, H, W\), got \(1, 3, 2, 4, 6\)",
        ),
        (lambda: stream.prefill([1]), ValueError, "video: expected 2 videos .* got list"),
        (lambda: stream.prefill(frame[..., :4]), ValueError, "the stream's frames are 4 x 6, got 4 x 4"),
        (
            lambda: stream.prefill(frame[:, :, :1]),
            ValueError,
            "video: expected frames, height and width to be multiples",
        ),
        (lambda: stream.restore(VideoStream(small())), TypeError, "snapshot: expected a stream of the same model"),
    ]:
        with pytest.raises(error, match=message):
            wrong()
        assert same(stream, kept)
    last = stream.next()
    with pytest.raises(ValueError, match="positions='sincos' end at length=12"):
        stream.next()
    assert stream.frame == 6
    whole = draw(VideoStream(model, [0, 1], context=context, steps=2), 6)
    assert torch.equal(torch.cat([drawn, last], dim=2), whole)


def test_a_class_model_asks_for_labels():
    with pytest.raises(TypeError, match="labels: this model was built with n_classes=4 and needs them"):
        VideoStream(small(n_classes=4)).next()


@pytest.fixture
def saved(tmp_path):
    stream = VideoStream(small(n_classes=4), [0, 1], steps=2)
    stream.next()
    stream.save(tmp_path / "stream")
    return tmp_path / "stream"


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_files_are_named(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{saved.name} is truncated or is not a safetensors file"):
        VideoStream.load(saved, small(n_classes=4))


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: small(n_classes=4, n_layers=3), "stream of another model: n_layers 2, not 3"),
        (lambda: small(n_classes=4, mixer=HYBRID), "another model: mixer power, not .*; n_layers|another model: mixer"),
        (lambda: small(seed=1, n_classes=4), "a model like this one, but with other weights or of another dtype"),
        (lambda: small(n_classes=4).float(), "a model like this one, but with other weights or of another dtype"),
    ],
)
def test_streams_of_other_models_are_named(saved, model, message):
    with pytest.raises(ValueError, match=message):
        VideoStream.load(saved, model())


def test_files_that_hold_no_stream_are_named(saved, tmp_path):
    from pom_ext.models.checkpoint import load_model, save_checkpoint

    with pytest.raises(FileNotFoundError, match="no file at"):
        VideoStream.load(tmp_path / "nothing", small())
    model = small(n_classes=4)
    save_checkpoint(tmp_path / "model", {"ema": model.state_dict()}, {"model": model.config})
    with pytest.raises(ValueError, match="holds a model, not a stream"):
        VideoStream.load(tmp_path / "model", model)
    with pytest.raises(ValueError, match="holds no model"):
        load_model(saved)


def test_a_past_cut_out_of_the_file_is_noticed(saved):
    """A file whose header is whole, and whose settings ask for more than it holds."""
    raw = saved.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    settings = json.loads(header["__metadata__"]["pom_ext"])
    settings["stream"]["context"] = "shared"
    header["__metadata__"]["pom_ext"] = json.dumps(settings)
    changed = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + size :])
    with pytest.raises(ValueError, match="holds 1 pasts, its settings ask for 2"):
        VideoStream.load(saved, small(n_classes=4))


# Training
