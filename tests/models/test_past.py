"""Frame after frame equals the whole clip; what a stream keeps, and forgets."""

import pytest
import torch
from safetensors.torch import load, save
from video_cases import (
    CHUNKINGS,
    CONDITION,
    CONDITIONS,
    CONV,
    FRAMES,
    HYBRID,
    MIXER,
    MIXERS,
    SMALL,
    ZEROS,
    cut,
    inputs,
    small,
    stream,
    tensors,
)

from pom_ext import PoM, State
from pom_ext.models import Past, VideoDiT
from pom_ext.models.blocks import Grid
from pom_ext.models.cache import Forgetting, KeyValues
from pom_ext.models.video_blocks import FrameAttention, FrameMixer, Layout

# Frame after frame


@MIXER
@CONV
@CONDITION
@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per-frame"])
@torch.no_grad()
def test_any_chunks_equal_the_whole_clip(mixer, local_conv, condition, per_frame):
    model = small(mixer=mixer, local_conv=local_conv, **CONDITIONS[condition])
    given = inputs(model, per_frame=per_frame)
    whole = model(**given, frame_causal=True)
    pasts = []
    for chunks in CHUNKINGS:
        out, past = stream(model, given, chunks)
        torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)
        pasts.append(past)
    for past in pasts:
        assert (past.frames, past.height, past.width) == (FRAMES, 2, 3)
        torch.testing.assert_close(list(tensors(past)), list(tensors(pasts[0])), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions, mixer", [("space", "product"), ("rotary", "power"), ("rotary", HYBRID)])
@torch.no_grad()
def test_positions_without_end(positions, mixer):
    """Longer than `length`, and still the same in any chunks."""
    model = small(mixer=mixer, positions=positions, length=4, dim=24, n_heads=6)
    given = inputs(model)
    whole = model(**given, frame_causal=True)
    for chunks in CHUNKINGS:
        torch.testing.assert_close(stream(model, given, chunks)[0], whole, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(**given), whole)


@MIXER
@CONV
@torch.no_grad()
def test_frame_causal_never_sees_later_frames(mixer, local_conv):
    model = small(mixer=mixer, local_conv=local_conv, **CONDITIONS["text"])
    given = inputs(model, per_frame=True)
    changed = dict(given, video=given["video"].clone(), time=given["time"].clone())
    changed["video"][:, :, 6:] = 100 * torch.randn_like(changed["video"][:, :, 6:])
    changed["time"][:, 3:] = 7
    before, after = (model(**g, frame_causal=True) for g in (given, changed))
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert (before[:, :, 6:] != after[:, :, 6:]).all()
    assert (model(**given)[:, :, :6] != model(**changed)[:, :, :6]).all()  # joint


@MIXER
@torch.no_grad()
def test_every_frame_sees_the_first(mixer):
    model = small(mixer=mixer, local_conv=False)
    given = inputs(model)
    changed = dict(given, video=given["video"].clone())
    changed["video"][:, :, 0] += 1
    for causal in (True, False):
        before, after = (model(**g, frame_causal=causal) for g in (given, changed))
        assert (before[:, :, -1] != after[:, :, -1]).all()


@MIXER
def test_gradients_of_a_stream_are_those_of_the_whole_clip(mixer):
    model = small(mixer=mixer, **CONDITIONS["text"])
    given = inputs(model)
    gradients = []
    for run in (lambda: model(**given, frame_causal=True), lambda: stream(model, given, (2, 1, 3))[0]):
        for tensor in (given["video"].requires_grad_(), given["text"].requires_grad_(), *model.parameters()):
            tensor.grad = None
        run().square().sum().backward()
        gradients.append([t.grad for t in (given["video"], given["text"], *model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


# The past


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
    fork, restored = past.clone(), Past.from_state_dict(load(save(past.state_dict())))
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
        (lambda t: t.pop("1.tail"), "2 layers, all or none of them with a tail, got 1 tails"),
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
        "tail",
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
        Past.from_state_dict(held)


def test_past_moves_between_devices_only():
    with pytest.raises((TypeError, RuntimeError)):
        Past(1, 1, 1, (State.empty(1, 4),)).to(torch.float32)


def test_key_values_grow():
    layout = Layout(Grid(2, 2), causal=True)
    memory = FrameAttention(8, 2)(torch.zeros(1, 1, 4, 8), layout)[1]
    assert isinstance(memory, KeyValues) and memory.keys.shape == (1, 4, 8)
    memory = FrameAttention(8, 2)(torch.zeros(1, 2, 4, 8), layout, memory)[1]
    assert memory.values.shape == (1, 12, 8)


# All frames at once among finished ones


@MIXER
@CONV
@CONDITION
@pytest.mark.parametrize("marks", ["shared", "per-frame"])
@pytest.mark.parametrize("finished_time", [None, "shared", "per-frame"])
def test_among_finished_frames_all_at_once_equals_one_by_one(mixer, local_conv, condition, marks, finished_time):
    """Outputs, the past, and the gradients of the summed loss: what training in parallel rests on."""
    model = small(mixer=mixer, local_conv=local_conv, **CONDITIONS[condition])
    given = inputs(model, per_frame=marks == "per-frame")
    finished = torch.randn_like(given["video"])
    times = {
        None: torch.zeros(3),
        "shared": torch.tensor([0.0, 300, 7]),
        "per-frame": 50 * torch.arange(18.0).view(3, 6),
    }
    clean = given | {"video": finished, "time": times[finished_time].double()}
    past, outs = None, []
    for frame in range(FRAMES):
        outs.append(model(**cut(model, given, frame, frame + 1), frame_causal=True, past=past))
        _, past = model(**cut(model, clean, frame, frame + 1), frame_causal=True, past=past, return_past=True)
    expected = torch.cat(outs, dim=2)
    options = {} if finished_time is None else {"finished_time": clean["time"]}
    out, after = model(**given, frame_causal=True, finished=finished, return_past=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(list(tensors(after)), list(tensors(past)), rtol=1e-10, atol=1e-10)
    one_by_one, at_once = (
        torch.autograd.grad((result - 1).square().sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        for result in (expected, out)
    )
    for name, a, b in zip(dict(model.named_parameters()), one_by_one, at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@MIXER
@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_finished_frames_come_in_chunks_too(mixer, window):
    model = small(mixer=mixer, positions="space")
    given = inputs(model)
    finished, past = torch.randn_like(given["video"]), model.start(3, window=window)
    whole = model(**given, frame_causal=True, finished=finished, past=past)
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        part = cut(model, given, first, last)
        held = {"finished": finished[:, :, 2 * first : 2 * last], "past": past}
        out, past = model(**part, frame_causal=True, return_past=True, **held)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-10, atol=1e-10)


@MIXER
@torch.no_grad()
def test_a_noisy_frame_changes_no_other(mixer):
    model = small(mixer=mixer)
    given, finished = inputs(model), torch.randn(3, 3, 2 * FRAMES, 4, 6, dtype=torch.float64)
    changed = given["video"].clone()
    changed[:, :, 4:6] += 1
    before, after = (
        model(**(given | {"video": video}), frame_causal=True, finished=finished) for video in (given["video"], changed)
    )
    same = torch.ones(2 * FRAMES, dtype=torch.bool)
    same[4:6] = False
    torch.testing.assert_close(after[:, :, same], before[:, :, same], rtol=1e-12, atol=1e-12)
    assert (after[:, :, 4:6] != before[:, :, 4:6]).any()


# Forgetting

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
    layout = Layout(Grid(1, size), causal=True, forgetting=Forgetting(window, decay))
    empty = mixer.empty_memory(2, 0, layout.forgetting, torch.float64, "cpu")
    for chunks in ((5,), (1,) * 5, (2, 3), (4, 1)):
        memory, outs = empty, []
        for part in x.split(chunks, dim=1):
            out, memory = mixer(part, layout, memory)
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
    layout = Layout(Grid(1, size), causal=True, forgetting=Forgetting(window))
    for chunks in ((5,), (1,) * 5, (2, 3), (4, 1)):
        memory, outs = None, []
        for part in x.split(chunks, dim=1):
            out, memory = mixer(part, layout, memory)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, dim=1), expected)
        assert memory.keys.shape[1] == size * min(5, window - 1)


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
        past = Past.from_state_dict(load(save(past.state_dict())))
        assert past.forgetting == Forgetting(window, decay)
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
        (lambda: past_of().state_dict(), TypeError, "expected a Past, got dict"),
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


@torch.no_grad()
def test_the_stream_ends_where_its_positions_do_and_goes_on_after_an_error():
    model = small()
    given = inputs(model)
    expected = model(**given, frame_causal=True)
    _, past = stream(model, given, (5,))
    with pytest.raises(ValueError, match="end at length=12, 6 frames of tokens, got frames 5 to 6"):
        model(**cut(model, given, 4, 6), frame_causal=True, past=past)
    out, _ = stream(model, given, (1,), past, first=5)
    torch.testing.assert_close(out, expected[:, :, 10:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("option", [{"return_past": True}, {"past": Past(0, 2, 3, ())}], ids=["return_past", "past"])
def test_past_needs_frame_causal(option):
    with pytest.raises(ValueError, match="frame_causal: expected True with past or return_past"):
        VideoDiT(**SMALL)(**ZEROS, **option)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"finished": ZEROS["video"]}, "frame_causal: expected True with finished frames"),
        (
            {"finished": ZEROS["video"][:, :, :2], "frame_causal": True},
            r"finished: expected \(2, 3, 4, 4, 6\) .* as the video, got \(2, 3, 2, 4, 6\)",
        ),
        ({"finished": ZEROS["video"].double(), "frame_causal": True}, "finished: expected .*float32.* got .*float64"),
        ({"finished_time": torch.zeros(2)}, "finished_time: expected None where no finished frames are given"),
        (
            {"finished": ZEROS["video"], "finished_time": torch.zeros(3), "frame_causal": True},
            r"finished_time: expected shape \(2,\), one per video, or \(2, 2\), one per frame .* got \(3,\)",
        ),
        ({"finished": ZEROS["video"].to("meta"), "frame_causal": True}, "finished: expected on cpu .* got meta"),
    ],
)
def test_finished_frames_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        VideoDiT(**SMALL)(**ZEROS, **options)
