"""VideoDiT: frame after frame equals the whole clip, what a stream keeps, conditions, positions, errors."""

import json

import pytest
import torch
from safetensors.torch import load, save

from pom_ext import State
from pom_ext.models import Past, VideoDiT, video_dit
from pom_ext.models.blocks import Gate, Grid
from pom_ext.models.past import KeyValues
from pom_ext.models.video import VIDEO_DITS
from pom_ext.models.video_blocks import (
    CrossAttention,
    FrameAttention,
    FrameConv,
    coordinates_3d,
    patchify_video,
    sincos_positions_3d,
    unpatchify_video,
)

FRAMES, TEXT_DIM = 6, 5  # frames of tokens
SMALL = {"in_channels": 3, "size": (4, 6), "length": 2 * FRAMES, "patch": (2, 2, 2), "dim": 16, "n_layers": 2}
SMALL |= {"n_heads": 2, "ffw_expand": 2}
HYBRID = ["product", "attention", "power"]
CONDITIONS = {"text": {"text_dim": TEXT_DIM}, "class": {"n_classes": 4}, "none": {}}
CHUNKINGS = [(1,) * FRAMES, (FRAMES,), (2, 4), (3, 1, 2), (1, 5)]

MIXERS = {"product": "product", "power": "power", "attention": "attention", "hybrid": HYBRID}
MIXER = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
CONV = pytest.mark.parametrize("local_conv", [True, False], ids=["conv", "plain"])
CONDITION = pytest.mark.parametrize("condition", CONDITIONS)


def small(seed=0, **changes):
    """A small model that has left its initialisation, where every gate is closed and the output 0."""
    torch.manual_seed(seed)
    if not isinstance(changes.get("mixer", ""), str):
        changes["n_layers"] = len(changes["mixer"])
    model = VideoDiT(**(SMALL | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model, frames=FRAMES, batch=3, size=None, per_frame=False):
    """Arguments of a forward pass; the last sample's text is empty."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.in_channels, frames * model.patch[0], *(size or model.size))
    given = {"video": torch.randn(shape, generator=generator, dtype=torch.float64)}
    marks = (batch, frames) if per_frame else (batch,)
    given["time"] = 990 * torch.rand(marks, generator=generator, dtype=torch.float64)
    if model.text_dim:
        given["text"] = torch.randn(batch, 7, model.text_dim, generator=generator, dtype=torch.float64)
        given["text_weight"] = torch.rand(batch, 7, generator=generator, dtype=torch.float64)
        given["text_weight"][-1] = 0
    if model.n_classes:
        given["labels"] = torch.randint(0, model.n_classes + 1, marks, generator=generator)
    return given


def cut(model, given, first, last):
    """The arguments of the frames first to last."""
    t = model.patch[0]
    part = dict(given, video=given["video"][:, :, first * t : last * t])
    return part | {k: given[k][:, first:last] for k in ("time", "labels") if k in given and given[k].dim() == 2}


def stream(model, given, chunks, past=None, first=0):
    outs = []
    for chunk in chunks:
        out, past = model(**cut(model, given, first, first + chunk), frame_causal=True, past=past, return_past=True)
        first += chunk
        outs.append(out)
    return torch.cat(outs, dim=2), past


def tensors(past):
    return past.state_dict().values()


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
            assert sizes == [24 + tails + kept for kept in grown]
        else:
            width = model.blocks[0].mixer.state_width
            assert sizes == [24 + tails + layers * 2 * (2 * width + 1) * 8] * 5  # total, residual and count


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
    assert list(names) == ["seen", "0.total", "0.residual", "0.count", "1.keys", "1.values", "0.tail", "1.tail"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("seen"), "missing 'seen'"),
        (lambda t: t.update(seen=torch.zeros(2)), r"expected 'seen' of shape \(3,\), .* got \(2,\)"),
        (lambda t: t.pop("0.residual"), "missing '0.residual'"),
        (lambda t: t.pop("1.values"), "missing '1.values'"),
        (lambda t: t.pop("1.tail"), "2 layers, all or none of them with a tail, got 1 tails"),
        (lambda t: t.update(more=torch.zeros(1)), "beside them more"),
        (lambda t: t.update({"0.total": torch.zeros(1)}), r"expected total and residual \(B, G, C\)"),
        (lambda t: t.clear(), "missing 'seen'; got nothing"),
    ],
    ids=["seen", "seen-shape", "residual", "values", "tail", "unexpected", "shapes", "empty"],
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


# Conditions


@MIXER
@CONDITION
@pytest.mark.parametrize("frame_causal", [False, True], ids=["joint", "causal"])
def test_every_parameter_and_every_input_gets_a_gradient(mixer, condition, frame_causal):
    model = small(mixer=mixer, **CONDITIONS[condition])
    given = inputs(model, per_frame=True)
    floats = {name: t.requires_grad_() for name, t in given.items() if name in ("video", "time", "text")}
    model(**given, frame_causal=frame_causal).square().sum().backward()
    for name, tensor in [*floats.items(), *model.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


@MIXER
@CONDITION
@torch.no_grad()
def test_equal_times_per_frame_are_one_time(mixer, condition):
    model = small(mixer=mixer, **CONDITIONS[condition])
    given = inputs(model)
    marks = {k: given[k][:, None].expand(-1, FRAMES) for k in ("time", "labels") if k in given}
    torch.testing.assert_close(model(**(given | marks)), model(**given), rtol=1e-10, atol=1e-10)
    for name, frames in marks.items():
        other = frames.clone()
        other[:, -1] = (other[:, -1] + 1) % 4
        assert not torch.isclose(model(**(given | {name: other})), model(**given)).all()


@MIXER
@torch.no_grad()
def test_text_counts_by_its_weight(mixer):
    model = small(mixer=mixer, text_dim=TEXT_DIM)
    given = inputs(model)
    other = given["text"].clone()
    weight = given["text_weight"]
    weight[1, 2:] = 0
    other[1, 2:] = 50
    other[2] = -3  # the empty text
    out = model(**given)
    assert out.isfinite().all()
    assert torch.equal(model(**(given | {"text": other})), out)
    twice = given | {"text": given["text"].repeat(1, 2, 1), "text_weight": weight.repeat(1, 2)}
    torch.testing.assert_close(model(**twice), out, rtol=1e-10, atol=1e-10)
    whole = given | {"text_weight": None}
    torch.testing.assert_close(model(**whole), model(**(given | {"text_weight": torch.ones_like(weight)})))
    assert not torch.isclose(model(**whole), out).all()
    none = given | {"text": given["text"][:, :0], "text_weight": None}
    torch.testing.assert_close(model(**none)[2], out[2], rtol=1e-10, atol=1e-10)


@MIXER
@CONDITION
@torch.no_grad()
def test_videos_of_a_batch_do_not_mix(mixer, condition):
    model = small(mixer=mixer, **CONDITIONS[condition])
    given = inputs(model, per_frame=True)
    alone = torch.cat([model(**{k: v[i : i + 1] for k, v in given.items()}, frame_causal=True) for i in range(3)])
    torch.testing.assert_close(model(**given, frame_causal=True), alone, rtol=1e-10, atol=1e-10)
    assert model(**{k: v[:0] for k, v in given.items()}).shape == (0, *given["video"].shape[1:])


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2), (3, 1, 2), (1, 4, 2)])
@pytest.mark.parametrize("size", [(4, 6), (8, 4)])
@torch.no_grad()
def test_any_patch_and_resolution(patch, size):
    model = small(patch=patch, length=6)
    given = inputs(model, frames=6 // patch[0], size=size)
    out = model(**given)
    assert out.shape == given["video"].shape and out.dtype == torch.float64 and out.isfinite().all()


# Parts


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 4, 1)])
def test_unpatchify_inverts_patchify(patch):
    t, h, w = patch
    video = torch.arange(2 * 3 * 6 * 8 * 12).view(2, 3, 6, 8, 12)
    tokens = patchify_video(video, patch)
    assert tokens.shape == (2, 6 // t, 8 // h * (12 // w), t * h * w * 3)
    assert torch.equal(unpatchify_video(tokens, Grid(8 // h, 12 // w), patch), video)
    assert torch.equal(tokens[0, 1, 1, :3], video[0, :, t, 0, w])  # second frame, second patch, its first pixel


def test_positions_of_later_frames_continue_the_clip():
    like, grid = torch.zeros(1, dtype=torch.float64), Grid(2, 3)
    whole = sincos_positions_3d(0, 6, 6, grid, 16, like)
    assert whole.shape == (1, 6, 6, 16)
    assert torch.equal(sincos_positions_3d(4, 2, 6, grid, 16, like), whole[:, 4:])
    assert len(whole.flatten(0, 2).unique(dim=0)) == 36  # every token knows its place
    assert sincos_positions_3d(0, 1, 1, grid, 16, like).isfinite().all()
    coordinates = coordinates_3d(4, 2, grid, "cpu")
    assert coordinates.tolist() == [[t, r, c] for t in (4, 5) for r in range(2) for c in range(3)]


def test_frame_attention_is_attention_under_a_block_mask():
    mixer = FrameAttention(8, 2).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    mask = torch.ones(3, 3).tril().repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    q, k, v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = mixer.out_proj((scores @ v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(mixer(x, causal=True)[0], expected)


def test_cross_attention_weights_are_repetitions():
    cross = CrossAttention(8, 2).double()
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    repeated = context[:, [0, 0, 0, 2]]
    weight = torch.tensor([[3.0, 0, 1]], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(cross(x, context, weight=weight), cross(x, repeated))


def test_frame_convolution_is_a_causal_3x3x3_sum():
    conv = FrameConv(4).double()
    torch.nn.init.normal_(conv.conv.weight)
    torch.nn.init.normal_(conv.conv.bias)
    x = torch.randn(2, 4, 2 * 3, 4, dtype=torch.float64)
    video, kernel, expected = x.view(2, 4, 2, 3, 4), conv.conv.weight[:, 0], x.clone().view(2, 4, 2, 3, 4)
    for frame in range(4):
        for row in range(2):
            for column in range(3):
                total = conv.conv.bias.expand(2, -1)
                for f in range(max(frame - 2, 0), frame + 1):
                    for i in range(max(row - 1, 0), min(row + 2, 2)):
                        for j in range(max(column - 1, 0), min(column + 2, 3)):
                            total = total + video[:, f, i, j] * kernel[:, f - frame + 2, i - row + 1, j - column + 1]
                expected[:, frame, row, column] += total
    out, tail = conv(x, Grid(2, 3))
    torch.testing.assert_close(out, expected.view_as(x))
    assert torch.equal(tail, x[:, 2:])


@CONDITION
def test_a_new_model_starts_closed(condition):
    torch.manual_seed(0)
    model = VideoDiT(**SMALL | CONDITIONS[condition]).double()
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    assert len(gates) == 2 * (3 if condition == "text" else 2)
    assert all((gate(torch.randn(1, 16).double()) == 0).all() for gate in gates)
    assert (model(**inputs(model)) == 0).all()
    x, cond = torch.randn(2, 3, 6, 16).double(), torch.randn(2, 1, 1, 16).double()
    text = torch.randn(2, 7, 16).double() if condition == "text" else None
    assert torch.equal(model.blocks[0](x, cond, Grid(2, 3), True, text)[0], x)


@MIXER
@torch.no_grad()
def test_half_precision_and_autocast_stay_close_to_float64(mixer):
    model = small(mixer=mixer, **CONDITIONS["text"])
    given = inputs(model)
    expected = stream(model, given, (2, 1, 3))[0]

    def cast(dtype):
        return {k: t.to(dtype) if k in ("video", "text") else t for k, t in given.items()}

    half = stream(model.to(torch.bfloat16), cast(torch.bfloat16), (2, 1, 3))[0]
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = stream(model.float(), cast(torch.float32), (2, 1, 3))[0]
    assert (mixed - expected).norm() < 0.1 * expected.norm()


# Configuration and sizes


@pytest.mark.parametrize("mixer", ["attention", tuple(HYBRID)], ids=["one", "per-layer"])
def test_config_is_json_and_rebuilds_the_model(mixer):
    model = small(mixer=mixer, degree=4, expand=1, local_conv=False, positions="space", text_dim=TEXT_DIM, n_classes=2)
    config = json.loads(json.dumps(model.config))
    assert config == model.config
    again = VideoDiT(**config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**inputs(model)), model(**inputs(model)))


def test_sizes():
    assert len(VIDEO_DITS) == 12
    with torch.device("meta"):
        model = video_dit("XL/4", mixer="product", text_dim=32, n_layers=1)
    assert (model.dim, model.patch, model.text_dim, len(model.blocks)) == (1152, (2, 4, 4), 32, 1)
    with torch.device("meta"):
        mixer = video_dit("S/8", n_layers=1, patch=(1, 8, 8), positions="rotary").blocks[0].mixer
    assert (mixer.form, mixer.degree, mixer.expand, mixer.n_sel_heads, mixer.rope) == ("power", 3, 2, 6, "3d")
    with pytest.raises(ValueError, match="name: expected one of S/2, .*, got 'M/2'"):
        video_dit("M/2")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 20}, "dim: expected a multiple of 8 .*, got 20"),
        ({"n_heads": 3}, "n_heads: expected a divisor of dim=16, got 3"),
        ({"size": (4, 5)}, r"size: expected a multiple of the patch \(t, h, w\) = \(2, 2, 2\), got \[4, 5\]"),
        ({"size": (4,)}, r"size: expected 2 positive integers, got \(4,\)"),
        ({"patch": 2}, "patch: expected 3 positive integers, got 2"),
        ({"length": 5}, r"length: expected a multiple of the patch .*, got 5"),
        ({"patch": (2, 0, 2)}, r"patch: expected 3 positive integers, got \(2, 0, 2\)"),
        ({"n_layers": 1.5}, "n_layers: expected an integer of at least 1, got 1.5"),
        ({"text_dim": -1}, "text_dim: expected an integer of at least 0, got -1"),
        ({"mixer": "local"}, "mixer: expected one of product, power, attention, got 'local'"),
        ({"mixer": ["power"] * 3}, "mixer: expected one for each of n_layers=2 layers, got 3"),
        ({"degree": 17}, "degree: expected an integer from 1 to 16, got 17"),
        ({"positions": "learned"}, "positions: expected one of sincos, space, rotary, got 'learned'"),
        ({"positions": "rotary", "mixer": "product"}, "positions: 'rotary' turns the features of mixer='power'"),
        ({"positions": "rotary"}, "rope: '3d' needs at least 6 gates to rotate, got 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        VideoDiT(**SMALL | changes)


ZEROS = {"video": torch.zeros(2, 3, 4, 4, 6), "time": torch.zeros(2)}
ALL = ZEROS | {"text": torch.zeros(2, 7, TEXT_DIM), "labels": torch.zeros(2).long()}


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("video", torch.zeros(2, 4, 4, 4, 6), ValueError, r"expected shape \(B, 3, T, H, W\), got \(2, 4, 4, 4, 6\)"),
        ("video", torch.zeros(3, 4, 4, 6), ValueError, r"expected shape .* got \(3, 4, 4, 6\)"),
        ("video", torch.zeros(2, 3, 3, 4, 6), ValueError, r"multiples of the patch \(2, 2, 2\), got 3 x 4 x 6"),
        ("video", torch.zeros(2, 3, 4, 4, 5), ValueError, "got 4 x 4 x 5"),
        ("video", torch.zeros(2, 3, 0, 4, 6), ValueError, "got 0 x 4 x 6"),
        ("video", torch.zeros(2, 3, 14, 4, 6), ValueError, "end at length=12, 6 frames of tokens, got frames 0 to 6"),
        ("video", ZEROS["video"].double(), TypeError, "expected torch.float32 .* got torch.float64"),
        ("video", [1.0], TypeError, "expected a tensor, got list"),
        ("video", ZEROS["video"].to("meta"), ValueError, "expected on cpu .* got meta"),
        ("time", torch.zeros(3), ValueError, r"expected shape \(2,\), .* or \(2, 2\), .* got \(3,\)"),
        ("time", torch.zeros(2, 4), ValueError, r"or \(2, 2\), one per frame of tokens, got \(2, 4\)"),
        ("time", 3.0, TypeError, "expected a tensor, got float"),
        ("text", torch.zeros(2, 7, 6), ValueError, r"expected shape \(2, L, 5\), got \(2, 7, 6\)"),
        ("text", torch.zeros(1, 7, 5), ValueError, r"expected shape \(2, L, 5\), got \(1, 7, 5\)"),
        ("text", ALL["text"].double(), TypeError, "expected torch.float32 .* got torch.float64"),
        ("text", None, TypeError, "built with text_dim=5 and needs them, got None"),
        ("text_weight", torch.zeros(2, 6), ValueError, r"expected shape \(2, 7\), got \(2, 6\)"),
        ("labels", torch.zeros(2, 1).long(), ValueError, r"expected shape \(2,\), .* got \(2, 1\)"),
        ("labels", torch.zeros(2), TypeError, "expected int64 or int32, got torch.float32"),
        ("labels", torch.tensor([0, 5]), ValueError, r"expected 0 to 4 \(no class\), got values from 0 to 5"),
        ("labels", None, TypeError, "built with n_classes=4 and needs them, got None"),
    ],
    ids=["channels", "axes", "frames", "patch", "empty", "too-long", "dtype", "type", "device", "time-shape",
         "time-frames", "time-number", "text-dim", "text-batch", "text-dtype", "no-text", "weight-shape", "labels-shape",
         "labels-dtype", "labels-high", "no-labels"],
)  # fmt: skip
def test_bad_inputs(name, value, error, message):
    with pytest.raises(error, match=f"{name}: .*{message}"):
        VideoDiT(**SMALL, text_dim=TEXT_DIM, n_classes=4)(**(ALL | {name: value}))


@pytest.mark.parametrize("name", ["text", "labels", "text_weight"])
def test_conditions_that_the_model_does_not_take(name):
    with pytest.raises(TypeError, match=f"{name}: "):
        VideoDiT(**SMALL)(**ZEROS, **{name: torch.zeros(2)})


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


def test_key_values_grow():
    memory = FrameAttention(8, 2)(torch.zeros(1, 1, 4, 8), causal=True)[1]
    assert isinstance(memory, KeyValues) and memory.keys.shape == (1, 4, 8)
    memory = FrameAttention(8, 2)(torch.zeros(1, 2, 4, 8), causal=True, memory=memory)[1]
    assert memory.values.shape == (1, 12, 8)
