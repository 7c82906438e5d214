"""VideoDiT: conditions, positions, parts, configuration, errors. Streams are in test_frame_by_frame.py."""

import json

import pytest
import torch
from video_cases import (
    CONDITION,
    CONDITIONS,
    FRAMES,
    HYBRID,
    MIXER,
    SMALL,
    TEXT_DIM,
    ZEROS,
    inputs,
    small,
    stream,
)

from pom_ext.layers.attention import CrossAttention, FrameAttention
from pom_ext.layers.blocks import ResidualGate
from pom_ext.layers.embeddings import patchify_video, sincos_positions_3d, unpatchify_video
from pom_ext.layers.layout import FrameLayout, Grid
from pom_ext.layers.local_conv import FrameConv
from pom_ext.models import VideoDiT, video_dit
from pom_ext.models.video import VIDEO_DITS

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
    coordinates = grid.coordinates(4, 2, "cpu")
    assert coordinates.tolist() == [[t, r, c] for t in (4, 5) for r in range(2) for c in range(3)]


def test_frame_attention_is_attention_under_a_block_mask():
    mixer = FrameAttention(8, 2).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    mask = torch.ones(3, 3).tril().repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    q, k, v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = mixer.out_proj((scores @ v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(mixer(x, FrameLayout(Grid(2, 2), causal=True))[0], expected)


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
    out, cache = conv(x, FrameLayout(Grid(2, 3)))
    torch.testing.assert_close(out, expected.view_as(x))
    assert torch.equal(cache, x[:, 2:])


@CONDITION
def test_a_new_model_starts_closed(condition):
    torch.manual_seed(0)
    model = VideoDiT(**SMALL | CONDITIONS[condition]).double()
    gates = [m for m in model.modules() if isinstance(m, ResidualGate)]
    assert len(gates) == 2 * (3 if condition == "text" else 2)
    assert all((gate(torch.randn(1, 16).double()) == 0).all() for gate in gates)
    assert (model(**inputs(model)) == 0).all()
    x, cond = torch.randn(2, 3, 6, 16).double(), torch.randn(2, 1, 1, 16).double()
    text = torch.randn(2, 7, 16).double() if condition == "text" else None
    assert torch.equal(model.blocks[0](x, cond, FrameLayout(Grid(2, 3), causal=True), text)[0], x)


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
        ({"mixer": "local"}, r"mixer: expected one of .*attention\+power, got 'local'"),
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
    ids=[
        "channels",
        "axes",
        "frames",
        "patch",
        "empty",
        "too-long",
        "dtype",
        "type",
        "device",
        "time-shape",
        "time-frames",
        "time-number",
        "text-dim",
        "text-batch",
        "text-dtype",
        "no-text",
        "weight-shape",
        "labels-shape",
        "labels-dtype",
        "labels-high",
        "no-labels",
    ],
)
def test_bad_inputs(name, value, error, message):
    with pytest.raises(error, match=f"{name}: .*{message}"):
        VideoDiT(**SMALL, text_dim=TEXT_DIM, n_classes=4)(**(ALL | {name: value}))


@pytest.mark.parametrize("name", ["text", "labels", "text_weight"])
def test_conditions_that_the_model_does_not_take(name):
    with pytest.raises(TypeError, match=f"{name}: "):
        VideoDiT(**SMALL)(**ZEROS, **{name: torch.zeros(2)})
