"""What a video model keeps of earlier frames: every choice of it streams, trains in parallel, and comes from files."""

import math
import random
import re
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from stream_cases import conditions, draw, same
from video_cases import CONDITIONS, FRAMES, HYBRID, cut, inputs, small, stream, tensors

from pom_ext import forward_mode
from pom_ext.models import ImageDiT, StreamCache, VideoDiT, inflate
from pom_ext.models.config import SIZES
from pom_ext.streaming import VideoStream

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("name", ["gated", "product"])
@pytest.mark.parametrize("jvp", [torch.func.jvp, forward_mode.jvp], ids=["torch", "forward_mode"])
def test_along_a_direction_of_noisy_frames_and_times(jvp, name):
    """The derivative that one-step training takes, the finished frames standing still; and its gradient."""
    model = small(**MODELS[name])
    given = inputs(model, batch=2, per_frame=True)
    video, time = given.pop("video"), given.pop("time")
    finished, directions = torch.randn_like(video), (torch.randn_like(video), torch.randn_like(time))
    seed = torch.randn_like(video)

    def run(video, time):
        return model(video, time, **given, frame_causal=True, finished=finished)

    out, tangent = jvp(run, (video, time), directions)
    leaves = video.requires_grad_(), time.requires_grad_()
    expected = run(*leaves)
    slopes = torch.autograd.grad(expected, leaves, seed, create_graph=True)
    along = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((tangent * seed).sum(), along, rtol=1e-8, atol=1e-9)
    if jvp is torch.func.jvp:
        return  # gradients of torch's tangent of a layer norm are wrong (pytorch/pytorch#196700)
    parameters = list(model.parameters())
    second = torch.autograd.grad((tangent * seed).sum(), parameters, allow_unused=True)
    for (key, _), a, b in zip(
        model.named_parameters(), second, torch.autograd.grad(along, parameters, allow_unused=True), strict=True
    ):
        a, b = (torch.zeros(()) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-7, atol=1e-7, msg=f"{key}: {a} {b}")


# Bytes

LATENTS = {"in_channels": 4, "size": (32, 32), "patch": (1, 2, 2)}
PUBLISHED = {  # docs/streaming.md; the last number is `space_groups` of the last column
    "digits": ({"in_channels": 1, "size": (28, 28), "patch": (1, 4, 4), "dim": 96, "n_layers": 4, "n_heads": 8}, 7),
    "S/2": (LATENTS | SIZES["S"], 2),
    "XL/2": (LATENTS | SIZES["XL"], 2),
    "Wan-1.3B": (LATENTS | {"in_channels": 16, "size": (60, 104), "dim": 1536, "n_layers": 30, "n_heads": 12}, 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bytes_in_the_guide_are_those_of_the_model(name):
    """And those of its formula."""
    options, groups = PUBLISHED[name]
    layers, dim, heads = options["n_layers"], options["dim"], options["n_heads"]
    bytes_of, patches = (4 if name == "digits" else 2), math.prod(options["size"]) // math.prod(options["patch"])
    split = {"read": "split", "fade": "head", "sink": 1, "local_conv": "frame"}
    columns = [{}, {"local_conv": "frame"}, split | {"local_conv": [1] + ["frame"] * (layers - 1)}, split]
    found = []
    for memory in [*columns, split | {"space_groups": groups}]:
        with torch.device("meta"):
            model = VideoDiT(**options, **memory).to(torch.float32 if bytes_of == 4 else torch.bfloat16)
        found.append(model.start().nbytes)
        states = 1 + model.sink + (patches // groups**2 if "space_groups" in memory else 0)
        counts = heads if "fade" in memory else 1
        tails = sum(block.local_conv.earlier for block in model.blocks)
        expected = layers * states * (2 * 2 * dim * 4 + 8 * counts) + tails * patches * dim * bytes_of
        assert found[-1] == expected
    (row,) = re.findall(rf"^\| {name} \|.*$", (ROOT / "docs" / "streaming.md").read_text(), re.MULTILINE)
    assert [int(n) for n in row.replace(",", "").split("|")[2:-1]] == [patches, *found]
    if name == "digits":  # a quarter of the default, whatever else it keeps
        assert found[2] * 4 < found[0]


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
