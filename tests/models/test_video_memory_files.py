"""Files of models and streams: those of earlier versions load, and what does not belong together is named."""

import json

import pytest
import torch
from stream_cases import draw
from video_cases import SMALL, inputs, small

from pom_ext.models import VideoDiT
from pom_ext.models.checkpoint import load_model, read_checkpoint, save_checkpoint
from pom_ext.streaming import VideoStream

NEW = ("read", "fade", "sink", "space_groups")


def rewrite(path, change):
    """The file with changed settings, as another version has written it."""
    parts, settings = read_checkpoint(path)
    change(settings, parts)
    save_checkpoint(path, parts, settings)


@pytest.mark.parametrize("local_conv", [True, False])
def test_files_from_before_there_was_a_choice_load(local_conv, tmp_path):
    model = small(local_conv=local_conv, n_classes=4).float()
    assert model.config["local_conv"] is local_conv
    save_checkpoint(
        tmp_path / "model", {"ema": model.state_dict()}, {"architecture": "VideoDiT", "model": model.config}
    )
    drawn = VideoStream(model, [1, 2], steps=2)
    draw(drawn, 2)
    drawn.save(tmp_path / "stream")

    def as_before(settings, parts):
        settings["model"] = {name: value for name, value in settings["model"].items() if name not in NEW}

    for name in ("model", "stream"):
        rewrite(tmp_path / name, as_before)
        assert b'"read"' not in (tmp_path / name).read_bytes()
    loaded, _ = load_model(tmp_path / "model")
    assert loaded.config == model.config
    again = VideoStream.load(tmp_path / "stream", loaded)
    assert torch.equal(draw(again, 3), draw(drawn, 3))


def test_settings_need_not_be_those_of_a_model(tmp_path):
    for settings in ([1, 2], {"model": "S"}, None):
        save_checkpoint(tmp_path / "any", {"part": {"x": torch.zeros(1)}}, settings)
        assert read_checkpoint(tmp_path / "any")[1] == settings


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({"local_conv": "frame"}, lambda p: p.update({"0.tail": torch.zeros(2, 2, 6, 16)}), "'0.tail': expected none"),
        ({"local_conv": 1}, lambda p: p.pop("1.tail"), r"'1.tail': expected \(2, 1, 6, 16\) .*, got none"),
        (
            {"read": "split", "fade": "head"},
            lambda p: p.update({"0.count": p["0.count"][..., 0].contiguous()}),
            r"'0.count': expected \(2, 1, 2\) .*, got \(2, 1\)",
        ),
        (
            {"read": "split", "sink": 1},
            lambda p: p.update({n: t[:, :1].contiguous() for n, t in p.items() if n.split(".")[0] in ("0", "1")}),
            r"'0.total': expected \(2, 2, 32\) .*, got \(2, 1, 32\)",
        ),
        ({}, lambda p: p.update(seen=torch.tensor([1, 3, 2])), "its frames have 3 x 2 patches, the video 2 x 3"),
    ],
    ids=["a-tail", "no-tail", "no-fade", "no-sink", "size"],
)
def test_stream_files_with_another_cache_are_refused_by_load(options, change, message, tmp_path):
    model = small(**{"local_conv": None, **options})
    drawn = VideoStream(model, batch=2, steps=2)
    draw(drawn, 1)
    drawn.save(tmp_path / "stream")
    rewrite(tmp_path / "stream", lambda settings, parts: change(parts["past0"]))
    with pytest.raises(ValueError, match=f"(?s)path: .*stream holds no stream of this model .*{message}"):
        VideoStream.load(tmp_path / "stream", model)


def test_a_stream_of_another_read_is_named(tmp_path):
    VideoStream(small(read="split"), steps=2).save(tmp_path / "stream")
    with pytest.raises(ValueError, match="stream of another model: read split, not shared"):
        VideoStream.load(tmp_path / "stream", small())


@pytest.mark.parametrize("theirs, ours", [(True, 1), (False, 0)])
def test_a_stream_of_another_tail_is_named(theirs, ours, tmp_path):
    """In Python True == 1 and False == 0."""
    VideoStream(small(local_conv=theirs), steps=2).save(tmp_path / "stream")
    with pytest.raises(ValueError, match=f"stream of another model: local_conv {theirs}, not {ours}"):
        VideoStream.load(tmp_path / "stream", small(local_conv=ours))


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        ({"fade": "head"}, {}, r"'0.count': expected \(2, 1\) .*, got \(2, 1, 2\)"),
        ({}, {"fade": "gated"}, r"'0.count': expected \(2, 1, 2\) .*, got \(2, 1\)"),
        ({"sink": 1}, {}, r"'0.total': expected \(2, 1, 32\) .*, got \(2, 2, 32\)"),
        ({}, {"space_groups": 2}, r"'0.total': expected \(2, 3, 32\) .*, got \(2, 1, 32\)"),
        ({"local_conv": 1}, {"local_conv": "clip"}, r"'0.tail': expected \(2, 2, 8, 16\) .*, got \(2, 1, 8, 16\)"),
        ({"local_conv": 1}, {"local_conv": "frame"}, r"'0.tail': expected none, got \(2, 1, 8, 16\)"),
        ({"mixer": "attention"}, {}, "'0.total': expected .*, got none"),
    ],
    ids=str,
)
@torch.no_grad()
def test_caches_of_other_models_are_named(theirs, ours, message):
    options = {"read": "split", "size": (4, 8)}
    other, model = small(**options | theirs), small(**options | ours)
    given = inputs(model, frames=1, batch=2)
    past = other(**given, frame_causal=True, return_past=True)[1]
    with pytest.raises(ValueError, match=f"past: {message}"):
        model(**given, frame_causal=True, past=past)


SPLIT = {"read": "split"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"read": "both"}, "read: expected 'shared' or 'split', got 'both'"),
        ({"read": True}, "read: expected 'shared' or 'split', got True"),
        ({"read": ["split"]}, r"read: expected 'shared' or 'split', got \['split'\]"),
        (
            {"fade": "head"},
            "fade: expected None, or with read='split' also 'head' or 'gated', got 'head' with read='sh",
        ),
        (SPLIT | {"fade": True}, "fade: expected None, .* got True with read='split'"),
        (SPLIT | {"fade": "fast"}, "fade: expected None, .* got 'fast' with read='split'"),
        (SPLIT | {"fade": ["head", None]}, "fade: expected None, .* got .'head', None. with"),
        ({"sink": 1}, "sink: expected 0 with read='shared', got 1; read='split' has a gate for it"),
        (SPLIT | {"sink": 7}, "sink: expected at most the 6 frames of tokens of a training clip, got 7"),
        (SPLIT | {"sink": -1}, "sink: expected an integer of at least 0, got -1"),
        (SPLIT | {"sink": True}, "sink: expected an integer of at least 0, got True"),
        (SPLIT | {"sink": "1"}, "sink: expected an integer of at least 0, got '1'"),
        ({"space_groups": 2}, "space_groups: expected 1 with read='shared', got 2; read='split' has a gate for it"),
        (SPLIT | {"space_groups": 2}, "space_groups: expected a divisor of the patches of a frame, 2 x 3, got 2"),
        (SPLIT | {"space_groups": 0}, "space_groups: expected an integer of at least 1, got 0"),
        ({"local_conv": 3}, "local_conv: expected 'frame', 'clip', None, or 0 to 2 earlier frames, got 3"),
        ({"local_conv": -1}, "local_conv: expected .* got -1"),
        ({"local_conv": "True"}, "local_conv: expected .* got 'True'"),
        ({"local_conv": "video"}, "local_conv: expected .* got 'video'"),
        ({"local_conv": 1.0}, "local_conv: expected .* got 1.0"),
        ({"local_conv": ["clip", 3]}, "local_conv: expected .* got 3"),
        ({"local_conv": ["clip", ["frame"]]}, r"local_conv: expected .* got \['frame'\]"),
        ({"local_conv": ["clip"]}, "local_conv: expected one for each of n_layers=2 layers, got 1"),
        ({"local_conv": []}, "local_conv: expected one for each of n_layers=2 layers, got 0"),
        ({"mixer": "attention+local"}, "mixer: expected one of .*, got 'attention.local'"),
    ],
    ids=str,
)
def test_models_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        VideoDiT(**SMALL | options)


def test_windows_and_sizes_that_do_not_fit():
    fading, blocks = small(read="split", fade="head"), small(read="split", space_groups=2, size=(4, 8))
    with pytest.raises(ValueError, match="window: expected 0, got 3; this model was trained with a past that fades"):
        fading.start(window=3)
    with pytest.raises(ValueError, match="window: expected 0, got 2"):
        VideoStream(fading, window=2)
    message = "space_groups: expected a divisor of the patches of a frame, 2 x 3, got 2"
    with pytest.raises(ValueError, match=message):
        blocks.start(size=(4, 6))
    with pytest.raises(ValueError, match=message):
        blocks(**inputs(blocks, size=(4, 6)))


@pytest.mark.parametrize("local_conv", ["clip", None, "frame", 1, ["clip", "frame"]], ids=str)
def test_config_is_json_and_rebuilds_the_model(local_conv):
    model = small(read="split", fade="gated", sink=2, local_conv=local_conv, mixer="attention+product")
    config = json.loads(json.dumps(model.config))
    assert config == model.config and config["local_conv"] == local_conv
    again = VideoDiT(**config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**inputs(model)), model(**inputs(model)))
