"""What a stream keeps of earlier frames: its size, files, forks, windows and decay, and errors."""

import pytest
import torch
from safetensors.torch import load, save
from video_cases import CHUNKINGS, CONV, FRAMES, HYBRID, MIXER, MIXERS, SMALL, ZEROS, inputs, small, stream, tensors

from pom_ext import PoM, State
from pom_ext.layers.attention import FrameAttention, KeyValues
from pom_ext.layers.frame_mixer import FrameMixer
from pom_ext.layers.layout import ContextWindow, FrameLayout, Grid
from pom_ext.models import StreamCache, VideoDiT

# Size, files, forks


@torch.no_grad()
def test_past_has_constant_size():
    def size(past):  # of the memory held, not of the views on it
        return sum(t.untyped_storage().nbytes() for t in tensors(past))

    for mixer in ("product", "power", "attention"):
        model = small(mixer=mixer, positions="space", local_conv=True)
        given = inputs(model, batch=2)
        sizes = [size(stream(model, given, chunks)[1]) for chunks in [(2,), (6,), (1, 1), (1,) * 6, (4, 2)]]
        frame, layers = 2 * 3, 2
        tails = layers * 2 * 2 * frame * 16 * 8
        if mixer == "attention":
            grown = [layers * 2 * 2 * frames * frame * 16 * 8 for frames in (2, 6, 2, 6, 6)]
            assert sizes == [40 + tails + kept for kept in grown]
        else:
            width = model.blocks[0].mixer.state_width
            assert sizes == [40 + tails + layers * 2 * (2 * width + 1) * 8] * 5  # total, residual and count


@MIXER
@CONV
@torch.no_grad()
def test_clone_and_state_dict_are_exact_and_independent(mixer, local_conv):
    model = small(mixer=mixer, local_conv=local_conv)
    given = inputs(model)
    _, past = stream(model, given, (2, 1))
    expected, after = stream(model, given, (1, 2), past, first=3)
    fork, restored = past.clone(), StreamCache.from_state_dict(load(save(past.state_dict())))
    moved = past.to("cpu")
    for other in (fork, restored, moved):
        out, ended = stream(model, given, (1, 2), other, first=3)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(tensors(ended), tensors(after), strict=True))
    assert past.state_dict().keys() == restored.state_dict().keys() and restored.frames == 3
    for tensor in tensors(fork):
        tensor.zero_()
    assert torch.equal(stream(model, given, (1, 2), past, first=3)[0], expected)


@torch.no_grad()
def test_state_dict_names():
    model = small(mixer=["power", "attention"])
    names = model(**inputs(model), frame_causal=True, return_past=True)[1].state_dict().keys()
    layers = ["0.total", "0.residual", "0.count", "1.keys", "1.values", "0.tail", "1.tail"]
    assert list(names) == ["seen", "forgetting", *layers]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("seen"), "missing 'seen'"),
        (lambda t: t.update(seen=torch.zeros(2)), r"expected 'seen' of shape \(3,\), .* got \(2,\)"),
        (lambda t: t.pop("forgetting"), "missing 'forgetting'"),
        (lambda t: t.update(forgetting=torch.zeros(3)), r"expected 'forgetting' of shape \(2,\), .* got \(3,\)"),
        (lambda t: t.pop("0.residual"), "missing '0.residual'"),
        (lambda t: t.pop("1.values"), "missing '1.values'"),
        (lambda t: t.update(more=torch.zeros(1)), "beside them more"),
        (lambda t: t.update({"0.total": torch.zeros(1)}), r"expected total and residual \(B, G, C\)"),
        (lambda t: t.clear(), "missing 'seen'; got nothing"),
    ],
    ids=[
        "seen",
        "seen-shape",
        "forgetting",
        "forgetting-shape",
        "residual",
        "values",
        "unexpected",
        "shapes",
        "empty",
    ],
)
@torch.no_grad()
def test_broken_state_dicts_are_refused(change, message):
    model = small(mixer=["power", "attention"])
    held = model(**inputs(model), frame_causal=True, return_past=True)[1].state_dict()
    change(held)
    with pytest.raises(ValueError, match=message):
        StreamCache.from_state_dict(held)


def test_past_moves_between_devices_only():
    with pytest.raises((TypeError, RuntimeError)):
        StreamCache(1, 1, 1, (State.empty(1, 4),)).to(torch.float32)


def test_key_values_grow():
    layout = FrameLayout(Grid(2, 2), causal=True)
    cache = FrameAttention(8, 2)(torch.zeros(1, 1, 4, 8), layout)[1]
    assert isinstance(cache, KeyValues) and cache.keys.shape == (1, 4, 8)
    cache = FrameAttention(8, 2)(torch.zeros(1, 2, 4, 8), layout, cache)[1]
    assert cache.values.shape == (1, 12, 8)


# Windows and decay

FORGETTING = {"window 1": (1, 1.0), "window 3": (3, 1.0), "window 9": (9, 1.0), "decay": (0, 0.7), "all": (0, 1.0)}


def weight_of(age, window, decay):
    return 0.0 if age < 0 or (window and age >= window) else decay**age


@pytest.mark.parametrize("form, heads", [("product", 1), ("power", 4)])
@pytest.mark.parametrize("window, decay", FORGETTING.values(), ids=FORGETTING)
def test_forgetting_is_a_mask_with_those_weights(form, heads, window, decay):
    frames, size = 5, 3
    torch.manual_seed(0)
    mixer = FrameMixer(8, 2, form=form, n_sel_heads=heads).double()
    x = torch.randn(2, frames, size, 8, dtype=torch.float64)
    weights = [[weight_of(i - j, window, decay) for j in range(frames)] for i in range(frames)]
    mask = (
        torch.tensor(weights, dtype=torch.float64)
        .repeat_interleave(size, 0)
        .repeat_interleave(size, 1)
        .expand(2, -1, -1)
    )
    expected = PoM.forward(mixer, x.flatten(1, 2), mask=mask).view_as(x)
    layout = FrameLayout(Grid(1, size), causal=True, context_window=ContextWindow(window, decay))
    empty = mixer.new_cache(2, 0, layout, torch.float64, "cpu")
    for chunks in ((5,), (1,) * 5, (2, 3), (4, 1)):
        cache, outs = empty, []
        for part in x.split(chunks, dim=1):
            out, cache = mixer(part, layout, cache)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_attention_with_a_window_is_attention_under_a_band(window):
    mixer, size = FrameAttention(8, 2).double(), 3
    x = torch.randn(2, 5, size, 8, dtype=torch.float64)
    frame = torch.arange(5).repeat_interleave(size)
    age = frame[:, None] - frame
    q, k, v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1)
    expected = mixer.out_proj((scores @ v).transpose(1, 2).flatten(2)).view_as(x)
    layout = FrameLayout(Grid(1, size), causal=True, context_window=ContextWindow(window))
    for chunks in ((5,), (1,) * 5, (2, 3), (4, 1)):
        cache, outs = None, []
        for part in x.split(chunks, dim=1):
            out, cache = mixer(part, layout, cache)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, dim=1), expected)
        assert cache.keys.shape[1] == size * min(5, window - 1)


@MIXER
@pytest.mark.parametrize("window, decay", FORGETTING.values(), ids=FORGETTING)
@torch.no_grad()
def test_any_chunks_forget_alike(mixer, window, decay):
    if decay != 1 and "attention" in mixer:
        mixer = "power"  # attention does not fade
    model = small(mixer=mixer, positions="space")
    given = inputs(model)
    whole, after = model(**given, frame_causal=True, past=model.start(3, window=window, decay=decay), return_past=True)
    for chunks in CHUNKINGS:
        past = model.start(3, window=window, decay=decay)
        out, past = stream(model, given, chunks, past)
        torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)
        past = StreamCache.from_state_dict(load(save(past.state_dict())))
        assert past.context_window == ContextWindow(window, decay)
        torch.testing.assert_close(list(tensors(past)), list(tensors(after)), rtol=1e-10, atol=1e-10)
    plain = model(**given, frame_causal=True)
    assert torch.allclose(whole, plain, rtol=1e-10, atol=1e-10) == ((window, decay) in ((0, 1.0), (9, 1.0)))


@pytest.mark.parametrize("mixer", ["product", "attention"])
@torch.no_grad()
def test_what_left_the_window_leaves_no_trace(mixer):
    """Bit for bit: the sums are made anew from the frames in the window, nothing is subtracted."""
    model = small(mixer=mixer, positions="space", local_conv=False, n_layers=1)
    given = inputs(model)
    loud = given["video"].clone()
    loud[:, :, :4] *= 1e6
    pasts = [
        stream(model, given | {"video": video}, (1,) * FRAMES, model.start(3, window=4))[1]
        for video in (given["video"], loud)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors, pasts), strict=True))


@torch.no_grad()
def test_the_start_is_no_past_at_all():
    for mixer in MIXERS.values():
        model = small(mixer=mixer)
        given = inputs(model, frames=1)
        for size in (None, (8, 4)):
            given = inputs(model, frames=1, size=size)
            start = model.start(3, size)
            out = model(**given, frame_causal=True, past=start)
            torch.testing.assert_close(out, model(**given, frame_causal=True), rtol=1e-12, atol=1e-12)
    assert start.nbytes == sum(t.nbytes for t in tensors(start)) - 24 - 16  # without "seen" and "forgetting"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 0}, "batch: expected an integer of at least 1, got 0"),
        ({"window": -1}, "window: expected an integer of at least 0, got -1"),
        ({"size": (4, 5)}, r"size: expected multiples of the patch \(2, 2\), got 4 x 5"),
        ({"decay": 0.0}, "decay: expected a number above 0 and at most 1, got 0.0"),
        ({"decay": 0.5, "window": 2}, "decay: it goes without a window"),
        (
            {"decay": 0.5, "mixer": HYBRID, "n_layers": 3},
            "decay: .* fades the sums of polynomial mixers, not attention",
        ),
    ],
)
def test_starts_that_make_no_stream(arguments, message):
    model = VideoDiT(**SMALL | {name: arguments.pop(name) for name in ("mixer", "n_layers") if name in arguments})
    with pytest.raises(ValueError, match=message):
        model.start(**arguments)


# Errors


def past_of(batch=2, size=(4, 6), **changes):
    """The past of a model made with other arguments, after four video frames."""
    model = VideoDiT(**SMALL | changes)
    video = torch.zeros(batch, 3, 4, *size)
    return model(video, torch.zeros(batch), frame_causal=True, return_past=True)[1]


@pytest.mark.parametrize(
    "past, error, message",
    [
        (lambda: past_of(n_layers=3), ValueError, "expected one of 2 layers as the model, got 3"),
        (lambda: past_of(dim=24), ValueError, r"'0.total': expected \(2, 1, 32\) in .*, got \(2, 1, 48\)"),
        (lambda: past_of(batch=3), ValueError, r"'0.total': expected \(2, 1, 32\) in .*, got \(3, 1, 32\)"),
        (lambda: past_of(mixer=["power", "attention"]), ValueError, "'1.total': expected .*, got none; .* model"),
        (lambda: past_of(local_conv=False), ValueError, r"'0.tail': expected \(2, 2, 6, 16\) in .*, got none"),
        (lambda: past_of(size=(6, 4)), ValueError, "its frames have 3 x 2 patches, the video 2 x 3"),
        (lambda: past_of().state_dict(), TypeError, "expected a StreamCache, got dict"),
    ],
    ids=["layers", "width", "batch", "mixer", "conv", "size", "type"],
)
@torch.no_grad()
def test_pasts_of_another_model(past, error, message):
    with pytest.raises(error, match=f"(?s)past: .*{message}"):
        VideoDiT(**SMALL)(**ZEROS, frame_causal=True, past=past())


@MIXER
@torch.no_grad()
def test_past_in_another_precision_or_place(mixer):
    model = small(mixer=mixer).float()
    given = {name: tensor.float() for name, tensor in inputs(model).items()}
    past = model(**given, frame_causal=True, return_past=True)[1]
    with pytest.raises(ValueError, match="past: '0.*': expected .* in torch.float64, got .* in torch.float32"):
        model.double()(given["video"].double(), given["time"], frame_causal=True, past=past)
    with pytest.raises(ValueError, match=r"past: expected on cpu as the model, got meta; move it with \.to\(\)"):
        model.float()(**given, frame_causal=True, past=past.to("meta"))


@pytest.mark.parametrize(
    "option", [{"return_past": True}, {"past": StreamCache(0, 2, 3, ())}], ids=["return_past", "past"]
)
def test_past_needs_frame_causal(option):
    with pytest.raises(ValueError, match="frame_causal: expected True with past or return_past"):
        VideoDiT(**SMALL)(**ZEROS, **option)
