"""What a video model keeps of earlier frames: every choice of it streams, trains in parallel, and comes from files."""

import json
import random
from itertools import combinations, product

import pytest
import torch
from safetensors.torch import load, save
from stream_cases import conditions, draw, same
from video_cases import CONDITIONS, FRAMES, HYBRID, SMALL, cut, inputs, small, stream, tensors

from pom_ext.models import ImageDiT, StreamCache, VideoDiT, inflate
from pom_ext.models.checkpoint import load_model, read_checkpoint, save_checkpoint
from pom_ext.streaming import VideoStream

OPTIONS = {
    "memory": [("shared", None), ("split", None), ("split", "head"), ("split", "gated")],
    "sink": [0, 1, 3],
    "space_groups": [1, 2],
    "local_conv": [None, "frame", 1, "clip", ["frame", None, 1]],
    "mixer": ["product", "power", "attention+power", "attention+product", ["power", "attention", "attention+power"]],
    "positions": ["sincos", "space", "rotary"],
    "forgetting": [(0, 1.0), (3, 1.0), (0, 0.7)],
    "condition": ["none", "text", "class"],
}


def makes_a_model(memory, sink, space_groups, mixer, positions, forgetting, **_):
    (read, fade), (window, decay) = memory, forgetting
    return not (
        (read == "shared" and (sink or space_groups > 1))
        or (fade and window)
        or (decay != 1 and "attention" in mixer)  # a list with a layer of attention alone
        or (positions == "rotary" and str(mixer).endswith("product"))
    )


def pairs_of(case):
    return {(a, str(case[a]), b, str(case[b])) for a, b in combinations(case, 2)}


def draw_cases():
    """Models such that every pair of options that go together occurs."""
    everything = [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())]
    everything = [case for case in everything if makes_a_model(**case)]
    missing, generator, cases = set().union(*map(pairs_of, everything)), random.Random(0), []
    while missing:
        drawn = generator.sample(everything, 150)
        best = max(drawn, key=lambda case: len(missing & pairs_of(case)))
        if missing & pairs_of(best):
            cases.append(best)
            missing -= pairs_of(best)
    return cases


CASES = draw_cases()


def build(memory, sink, space_groups, local_conv, mixer, positions, condition, **_):
    options = {"read": memory[0], "fade": memory[1], "sink": sink, "space_groups": space_groups, "size": (4, 8)}
    options |= {"positions": positions, "mixer": mixer, "local_conv": local_conv, "dim": 24, "n_heads": 6}
    if isinstance(mixer, str) and isinstance(local_conv, list):
        options["n_layers"] = 3
    return small(**options, **CONDITIONS[condition])


def test_all_pairs_of_options_occur():
    found = set().union(*map(pairs_of, CASES))
    for a, b in combinations(OPTIONS, 2):
        for values in product(OPTIONS[a], OPTIONS[b]):
            both = dict(zip((a, b), values, strict=True))
            possible = any(
                makes_a_model(**dict(zip(OPTIONS, rest, strict=True)) | both) for rest in product(*OPTIONS.values())
            )
            assert ((a, str(both[a]), b, str(both[b])) in found) == possible


def describe(case):
    return "-".join(str(value).replace(" ", "") for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=describe)
@torch.no_grad()
def test_streamed_in_chunks_and_among_finished_frames(case):
    """The whole clip at once, in any chunks, and teacher forced in any chunks, are frame after frame."""
    model = build(**case)
    (window, decay), given = case["forgetting"], inputs(model, batch=2, per_frame=True)
    finished = torch.randn_like(given["video"])
    clean = given | {"video": finished, "time": torch.zeros_like(given["time"])}
    start = model.start(2, window=window, decay=decay)

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    outs, caches = {}, {}
    for name, frames in (("own", given), ("clean", clean)):
        outs[name], caches[name] = [], [start]
        for f in range(FRAMES):
            out, cache = stream(model, frames, (1,), caches[name][-1], first=f)
            outs[name].append(out)
            caches[name].append(cache)
    one_by_one, last = torch.cat(outs["own"], dim=2), caches["own"][-1]
    noisy = [stream(model, given, (1,), caches["clean"][f], first=f)[0] for f in range(FRAMES)]
    for chunks in ((FRAMES,), (2, 4), (3, 1, 2)):
        out, cache = stream(model, given, chunks, start)
        close(out, one_by_one)
        close(list(tensors(cache)), list(tensors(last)))
        first, cache, forced = 0, start, []
        for chunk in chunks:
            part, t = cut(model, given, first, first + chunk), model.patch[0]
            held = {"finished": finished[:, :, first * t : (first + chunk) * t], "past": cache}
            out, cache = model(**part, frame_causal=True, return_past=True, **held)
            forced.append(out)
            first += chunk
        close(torch.cat(forced, dim=2), torch.cat(noisy, dim=2))
        close(list(tensors(cache)), list(tensors(caches["clean"][-1])))
    if (window, decay) == (0, 1.0):
        close(model(**given, frame_causal=True), one_by_one)
    assert last.nbytes == sum(t.nbytes for t in tensors(last)) - 24 - 16  # without "seen" and "forgetting"
    restored = StreamCache.from_state_dict(load(save(caches["own"][3].state_dict())))
    assert torch.equal(stream(model, given, (1,), restored, first=3)[0], outs["own"][3])


@pytest.mark.parametrize("case", CASES, ids=describe)
@torch.no_grad()
def test_later_frames_are_seen_by_a_joint_model_only(case):
    model = build(**case)
    given = inputs(model, batch=1)
    changed = dict(given, video=given["video"].clone())
    changed["video"][:, :, -2:] += torch.randn_like(changed["video"][:, :, -2:])
    before, after = (model(**frames, frame_causal=True) for frames in (given, changed))
    assert torch.equal(before[:, :, :-2], after[:, :, :-2]) and (before[:, :, -2:] != after[:, :, -2:]).any()
    before, after = (model(**frames) for frames in (given, changed))
    assert all((a != b).any() for a, b in zip(before.unbind(2), after.unbind(2), strict=True))
    changed["video"][:, :, -2:] = given["video"][:, :, -2:]
    changed["video"][:, :, 0] += 1
    before, after = (model(**frames, frame_causal=True) for frames in (given, changed))
    assert all((a != b).any() for a, b in zip(before.unbind(2), after.unbind(2), strict=True))


@pytest.mark.parametrize("case", CASES[::3], ids=describe)
def test_every_parameter_gets_a_gradient(case):
    """Those of a stream of chunks are those of the whole clip."""
    model = build(**case | {"forgetting": (0, 1.0)})
    given, gradients = inputs(model, batch=2), []
    for run in (lambda: model(**given, frame_causal=True), lambda: stream(model, given, (2, 1, 3))[0]):
        gradients.append(torch.autograd.grad(run().square().sum(), list(model.parameters())))
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert a.isfinite().all() and a.any(), name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


ALL = {"read": "split", "size": (4, 8), "n_classes": 4, "positions": "space"}
MODELS = {
    "gated": ALL | {"fade": "gated", "sink": 1, "space_groups": 2, "local_conv": 1},
    "hybrid": ALL | {"fade": "head", "sink": 3, "local_conv": ["clip", "frame"], "mixer": "attention+power"},
    "product": ALL | {"mixer": "product", "local_conv": None, "space_groups": 2},
    "mixed": ALL | {"fade": "head", "mixer": ["attention", "attention+product"], "local_conv": "frame"},
}
MODEL = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


@MODEL
@pytest.mark.parametrize("context", [{"context": "shared"}, {}, {"context_noise": 0.3, "guidance": 2.0}], ids=str)
def test_forks_files_and_snapshots_of_streams_are_exact(options, context, tmp_path):
    model = small(**options)
    drawn = VideoStream(model, **conditions(model), steps=2, **context)
    draw(drawn, 2)
    snapshot = drawn.fork()
    drawn.save(tmp_path / "stream")
    size = drawn.nbytes
    expected = draw(drawn, 4)
    if "attention" not in options.get("mixer", ""):
        assert drawn.nbytes == size
    loaded, other = VideoStream.load(tmp_path / "stream", model), snapshot.fork()
    assert torch.equal(draw(loaded, 4), expected) and same(loaded, drawn)
    assert torch.equal(draw(other, 4), expected) and same(other, drawn)
    drawn.restore(snapshot)
    assert torch.equal(draw(drawn, 4), expected)
    assert not torch.equal(draw(snapshot.fork(seed=1), 4), expected)


@torch.no_grad()
def test_a_sink_enters_the_cache_without_noise():
    """A noisy frame that stays for ever would be wrong for ever: context noise begins after the sink."""
    model = small(**MODELS["hybrid"] | {"sink": 2})
    noisy, clean = (VideoStream(model, [1, 2], steps=2, context_noise=noise) for noise in (0.4, 0.0))
    video = torch.randn(2, 3, 8, 4, 8, dtype=torch.float64)
    noisy.prefill(video)
    clean.prefill(video)
    for a, b in zip(noisy.caches[0].mixer_caches, clean.caches[0].mixer_caches, strict=True):
        torch.testing.assert_close(a.total[:, 1], b.total[:, 1], rtol=1e-12, atol=1e-12)  # the sink
        assert not torch.isclose(a.total[:, 0], b.total[:, 0]).any()
    parts = VideoStream(model, [1, 2], steps=2, context_noise=0.4)
    for part in video.split((2, 4, 2), dim=2):
        parts.prefill(part)
    for a, b in zip(noisy.caches[0].state_dict().values(), parts.caches[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@MODEL
@torch.no_grad()
def test_half_precision_and_autocast_stay_close_to_float64(options):
    model = small(**options)
    given = inputs(model)
    expected = stream(model, given, (2, 1, 3))[0]
    half = stream(model.to(torch.bfloat16), given | {"video": given["video"].bfloat16()}, (2, 1, 3))[0]
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = stream(model.float(), given | {"video": given["video"].float()}, (2, 1, 3))[0]
    assert (mixed - expected).norm() < 0.1 * expected.norm()
    drawn = draw(VideoStream(model.bfloat16(), [1, 2], steps=2), 8)
    assert drawn.isfinite().all() and drawn.dtype == torch.bfloat16


@MODEL
@pytest.mark.parametrize("streamed", [False, True], ids=["trained", "streamed"])
def test_compiled_whole(options, streamed):
    """Training among finished frames with its gradients, and the steps of a stream."""
    torch.compiler.reset()
    model = small(**options).float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(model, per_frame=True).items()}
    if not streamed:
        finished, results = torch.randn_like(given["video"]), []
        for run in (model, compiled):
            out = run(**given, frame_causal=True, finished=finished)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
        return
    pasts = [model.start(3)] * 2
    with torch.no_grad():
        for f in range(FRAMES):
            frame = cut(model, given, f, f + 1) | {"frame_causal": True, "return_past": True}
            outs, pasts = zip(*(step(past=past, **frame) for step, past in zip((model, compiled), pasts, strict=True)))
            torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(past.state_dict() for past in pasts))


# Models of images


@pytest.mark.parametrize("memory", [{}, {"fade": "head", "sink": 1}, {"fade": "gated", "space_groups": 2}], ids=str)
@pytest.mark.parametrize("local_conv", ["frame", "clip", [1, "frame", 2]], ids=str)
@pytest.mark.parametrize("mixer, hybrid", [("power", None), ("product", "attention+product"), (HYBRID, None)], ids=str)
@torch.no_grad()
def test_an_inflated_model_predicts_a_first_frame_as_the_image_model(mixer, hybrid, local_conv, memory):
    image = ImageDiT(3, 4, 8, patch=2, dim=16, n_layers=3, n_heads=2, mixer=mixer).double()
    for parameter in image.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    options = {"read": "split", "local_conv": local_conv, **memory} | ({"mixer": hybrid} if hybrid else {})
    video = inflate(image, length=8, **options)
    picture, time, labels = torch.randn(2, 3, 8, 8).double(), torch.tensor([10.0, 700.0]), torch.tensor([1, 4])
    expected = image(picture, time, labels)[:, :, None]
    for causal in (False, True):
        found = video(picture[:, :, None], time, labels=labels, frame_causal=causal)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    video(picture[:, :, None].expand(-1, -1, 4, -1, -1), time, labels=labels, frame_causal=True)


def test_an_image_model_without_convolutions_gets_some():
    image = ImageDiT(3, 4, 8, patch=2, dim=16, n_layers=2, n_heads=2, local_conv=False)
    video = inflate(image, length=8, local_conv="clip")
    assert not video.blocks[0].local_conv.conv.weight.any()


@pytest.mark.parametrize(
    "image, options, message",
    [
        ({}, {"local_conv": None}, "local_conv: expected a convolution in the layers where the image model has one"),
        ({}, {"local_conv": ["frame", None]}, "local_conv: expected a convolution in the layers"),
        ({}, {"mixer": "product"}, "mixer: expected power, power of the image model, or with attention inside frames"),
        ({"mixer": "attention"}, {"mixer": "attention+power"}, "mixer: expected attention, attention of the image"),
    ],
    ids=str,
)
def test_video_models_that_would_lose_the_image_model(image, options, message):
    model = ImageDiT(3, 4, 8, patch=2, dim=16, n_layers=2, n_heads=2, **image)
    with pytest.raises(ValueError, match=message):
        inflate(model, length=8, **options)


# Files of earlier versions, and what is wrong

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
