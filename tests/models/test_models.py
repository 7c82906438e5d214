"""ImageDiT and its blocks: shapes, mixers, the local convolution, errors."""

import json

import pytest
import torch

from pom_ext.layers.attention import LocalAttention
from pom_ext.layers.blocks import MIXERS, AdaLN, ResidualGate, make_mixer
from pom_ext.layers.embeddings import patchify, unpatchify
from pom_ext.layers.layout import Grid
from pom_ext.layers.local_conv import LocalConv
from pom_ext.models import ImageDiT, image_dit
from pom_ext.models.image import IMAGE_DITS

SMALL = {"in_channels": 3, "n_classes": 5, "image_size": 16, "patch": 2, "dim": 16, "n_layers": 2, "n_heads": 4}
SMALL["window"] = 3
HYBRID = ["product", "local", "attention", "power", "local"]


def small(seed=0, **changes):
    """A small model that has left its initialisation, where every gate is closed and the output 0."""
    torch.manual_seed(seed)
    model = ImageDiT(**(SMALL | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(size=2, height=16, width=16, channels=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, channels, height, width, generator=generator, dtype=torch.float64)
    return images, torch.linspace(3, 990, size, dtype=torch.float64), torch.arange(size) % 6


ANY_MIXER = pytest.mark.parametrize("mixer", [*MIXERS, HYBRID], ids=[*MIXERS, "hybrid"])
REGISTERS = pytest.mark.parametrize("n_registers", [0, 3], ids=["plain", "registers"])


def options(mixer, n_registers=0):
    return {"mixer": mixer, "n_layers": 2 if isinstance(mixer, str) else len(mixer), "n_registers": n_registers}


@ANY_MIXER
@REGISTERS
@pytest.mark.parametrize("height, width", [(16, 16), (14, 22), (2, 2), (10, 4)])
def test_any_resolution(mixer, n_registers, height, width):
    images, time, labels = batch(2, height, width)
    out = small(**options(mixer, n_registers))(images, time, labels)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.isfinite().all()


@ANY_MIXER
@REGISTERS
def test_images_of_a_batch_do_not_mix(mixer, n_registers):
    model = small(**options(mixer, n_registers))
    images, time, labels = batch(4)
    alone = torch.cat([model(images[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(images, time, labels), alone, rtol=1e-9, atol=1e-9)
    assert model(images[:0], time[:0], labels[:0]).shape == (0, 3, 16, 16)


@ANY_MIXER
@REGISTERS
def test_every_parameter_and_every_input_gets_a_gradient(mixer, n_registers):
    model = small(**options(mixer, n_registers))
    images, time, labels = batch()
    images.requires_grad_(), time.requires_grad_()
    model(images, time, labels).square().sum().backward()
    for name, tensor in [("images", images), ("time", time), *model.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


def test_time_and_label_change_the_output():
    model = small()
    images, time, labels = batch()
    out = model(images, time, labels)
    assert not torch.allclose(model(images, time + 1, labels), out)
    assert not torch.allclose(model(images, time, labels + 1), out)


@pytest.mark.parametrize("mixer", ["product", "power", "attention"])
def test_every_pixel_sees_every_pixel(mixer):
    model = small(mixer=mixer, n_layers=1, local_conv=False)
    images, time, labels = batch(1)
    images.requires_grad_()
    model(images, time, labels)[0, :, 0, 0].sum().backward()
    assert (images.grad[0].abs().sum(0) > 0).all()


def test_windows_see_themselves_and_registers_everything():
    torch.manual_seed(0)
    x = torch.randn(1, 2 + 5 * 7, 8, dtype=torch.float64, requires_grad=True)
    mixer = LocalAttention(8, 2, window=3).double()
    seen_from = {"register": 0, "corner": 2, "last": -1}
    seen = {}
    for name, token in seen_from.items():
        (gradient,) = torch.autograd.grad(mixer(x, Grid(5, 7, registers=2))[0, token].sum(), x)
        seen[name] = gradient[0].abs().sum(-1) > 0
        assert seen[name][:2].all()  # registers are in every window
    assert seen["register"].all()
    assert seen["corner"][2:].view(5, 7).nonzero().tolist() == [[r, c] for r in range(3) for c in range(3)]
    assert seen["last"][2:].view(5, 7).nonzero().tolist() == [[3, 6], [4, 6]]


@pytest.mark.parametrize("shifted", [False, True])
def test_local_attention_is_attention_inside_its_windows(shifted):
    """Against full attention with the mask written out, on a grid that the windows do not divide."""
    torch.manual_seed(0)
    height, width, window, registers = 5, 7, 4, 2
    x = torch.randn(2, registers + height * width, 8, dtype=torch.float64)
    mixer = LocalAttention(8, 2, window=window, shifted=shifted).double()
    shift = 2 if shifted else 0
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cell = ((rows + shift) // window * 100 + (columns + shift) // window).flatten()
    mask = torch.ones(len(x[0]), len(x[0]), dtype=torch.bool)
    mask[registers:, registers:] = cell[:, None] == cell[None]
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = mixer.out_proj((scores @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, Grid(height, width, registers)), expected)


def test_every_other_local_layer_is_shifted():
    model = ImageDiT(**SMALL | {"n_layers": 5, "mixer": HYBRID[1:] + ["local"]})
    assert [b.mixer.shift for b in model.blocks if isinstance(b.mixer, LocalAttention)] == [0, 1, 0]


@REGISTERS
def test_models_differ_in_the_mixer_alone(n_registers):
    def others(mixer):
        torch.manual_seed(0)
        state = ImageDiT(**SMALL | {"mixer": mixer, "n_registers": n_registers}).state_dict()
        return {name: tensor.shape for name, tensor in state.items() if ".mixer." not in name}

    assert others("product") == others("power") == others("attention") == others("local")


def test_power_and_attention_models_have_equal_size():
    with torch.device("meta"):
        power, attention = (image_dit("B/4", mixer=mixer) for mixer in ("power", "attention"))
    count = [sum(p.numel() for p in model.parameters()) for model in (power, attention)]
    assert abs(count[0] / count[1] - 1) < 0.01


# The local convolution


@REGISTERS
def test_a_new_local_convolution_changes_nothing(n_registers):
    torch.manual_seed(0)
    with_conv = ImageDiT(**SMALL | {"n_registers": n_registers}).double()
    without = ImageDiT(**SMALL | {"n_registers": n_registers, "local_conv": False}).double()
    state = {name: torch.randn_like(t) if "local_conv" not in name else t for name, t in with_conv.state_dict().items()}
    with_conv.load_state_dict(state)
    without.load_state_dict({name: t for name, t in state.items() if "local_conv" not in name})
    assert torch.equal(with_conv(*batch()), without(*batch()))


@pytest.mark.parametrize("registers", [0, 2])
def test_local_convolution_is_a_3x3_sum_over_the_grid(registers):
    torch.manual_seed(0)
    conv = LocalConv(4).double()
    torch.nn.init.normal_(conv.conv.weight)
    torch.nn.init.normal_(conv.conv.bias)
    x = torch.randn(2, registers + 3 * 5, 4, dtype=torch.float64)
    expected = x.clone()
    image, kernel = x[:, registers:].view(2, 3, 5, 4), conv.conv.weight[:, 0]
    for row in range(3):
        for column in range(5):
            total = conv.conv.bias.expand(2, -1)
            for i in range(max(row - 1, 0), min(row + 2, 3)):
                for j in range(max(column - 1, 0), min(column + 2, 5)):
                    total = total + image[:, i, j] * kernel[:, i - row + 1, j - column + 1]
            expected[:, registers + row * 5 + column] += total
    torch.testing.assert_close(conv(x, Grid(3, 5, registers)), expected)


def test_local_convolution_transposes_nothing():
    tokens = torch.randn(2, 6 * 4, 8)
    image = tokens.unflatten(1, (6, 4)).permute(0, 3, 1, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)
    out = LocalConv(8).conv(image).permute(0, 2, 3, 1)
    assert out.is_contiguous()


# Parts


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_inverts_patchify(patch):
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, 96 // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, Grid(8 // patch, 12 // patch), patch), images)
    assert torch.equal(tokens[0, 1, :3], images[0, :, 0, patch])  # second patch of the first row, its first pixel


def test_a_new_model_starts_closed():
    model = ImageDiT(**SMALL).double()
    assert all((m(torch.randn(1, 1, 16).double()) == 0).all() for m in model.modules() if isinstance(m, ResidualGate))
    assert all((m.modulation.weight == 0).all() for m in model.modules() if isinstance(m, AdaLN))
    x, cond = torch.randn(1, 64, 16).double(), torch.randn(1, 1, 16).double()
    assert torch.equal(model.blocks[0](x, cond, Grid(8, 8)), x)
    assert (model(*batch()) == 0).all()


def test_registers_start_small_and_different():
    model = ImageDiT(**SMALL | {"n_registers": 3})
    for tensor in (model.registers, model.register_cond, model.positions.table, model.position_cond.table):
        assert 0.005 < tensor.std() < 0.05


@pytest.mark.parametrize("n_registers", [0, 3])
def test_half_precision_and_autocast_stay_close_to_float64(n_registers):
    model = small(n_registers=n_registers)
    images, time, labels = batch(2, 12, 20)
    expected = model(images, time, labels)
    half = model.to(torch.bfloat16)(images.bfloat16(), time.float(), labels)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.float()(images.float(), time.float(), labels)
    assert (mixed - expected).norm() < 0.1 * expected.norm()


# Configuration and sizes


@pytest.mark.parametrize("mixer", ["attention", tuple(HYBRID)], ids=["one", "per-layer"])
def test_config_is_json_and_rebuilds_the_model(mixer):
    model = small(**options(mixer, 3), degree=4, expand=1, ffw_expand=2, local_conv=False)
    config = json.loads(json.dumps(model.config))
    assert config == model.config
    again = ImageDiT(**config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*batch()), model(*batch()))


def test_sizes():
    assert len(IMAGE_DITS) == 12
    with torch.device("meta"):
        model = image_dit("XL/2", mixer="product", n_classes=10, n_layers=1)
    assert (model.dim, model.patch, model.n_classes, len(model.blocks)) == (1152, 2, 10, 1)
    assert (model.blocks[0].mixer.form, model.blocks[0].mixer.degree) == ("product", 2)
    with torch.device("meta"):
        mixer = image_dit("S/8", n_layers=1).blocks[0].mixer
    assert (mixer.form, mixer.degree, mixer.expand, mixer.n_sel_heads) == ("power", 3, 2, 6)
    with pytest.raises(ValueError, match="name: expected one of S/2, .*, got 'M/2'"):
        image_dit("M/2")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 18}, "dim: expected a multiple of 4 .*, got 18"),
        ({"n_heads": 3}, "n_heads: expected a divisor of dim=16, got 3"),
        ({"image_size": 15}, "image_size: expected a multiple of patch=2, got 15"),
        ({"patch": 0}, "patch: expected an integer of at least 1, got 0"),
        ({"n_layers": 1.5}, "n_layers: expected an integer of at least 1, got 1.5"),
        ({"mixer": "mamba"}, "mixer: expected one of product, power, attention, local, got 'mamba'"),
        ({"mixer": ["power"] * 3}, "mixer: expected one for each of n_layers=2 layers, got 3"),
        ({"degree": 17}, "degree: expected an integer from 1 to 16, got 17"),
        ({"degree": 0}, "degree: expected an integer from 1 to 16, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        ImageDiT(**SMALL | changes)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("images", torch.zeros(2, 4, 8, 8), ValueError, r"expected shape \(B, 3, H, W\), got \(2, 4, 8, 8\)"),
        ("images", torch.zeros(3, 8, 8), ValueError, r"expected shape .* got \(3, 8, 8\)"),
        ("images", torch.zeros(2, 3, 8, 9), ValueError, "multiples of the patch size 2, got 8 x 9"),
        ("images", torch.zeros(2, 3, 0, 8), ValueError, "got 0 x 8"),
        ("images", torch.zeros(2, 3, 8, 8).double(), TypeError, "expected torch.float32 .* got torch.float64"),
        ("images", [1.0], TypeError, "expected a tensor, got list"),
        ("images", torch.zeros(2, 3, 8, 8, device="meta"), ValueError, "expected on cpu .* got meta"),
        ("time", torch.zeros(3), ValueError, r"expected shape \(2,\), one per image, got \(3,\)"),
        ("time", 3.0, TypeError, "expected a tensor, got float"),
        ("labels", torch.zeros(2, 1).long(), ValueError, r"expected shape \(2,\), one per image, got \(2, 1\)"),
        ("labels", torch.zeros(2), TypeError, "expected int64 or int32, got torch.float32"),
        ("labels", torch.tensor([0, 6]), ValueError, r"expected 0 to 5 \(no class\), got values from 0 to 6"),
        ("labels", torch.tensor([-1, 5]), ValueError, r"expected 0 to 5 \(no class\), got values from -1 to 5"),
    ],
    ids=[
        "channels",
        "axes",
        "patch",
        "empty",
        "dtype",
        "type",
        "device",
        "time-shape",
        "time-number",
        "labels-shape",
        "labels-dtype",
        "labels-high",
        "labels-low",
    ],
)
def test_bad_inputs(name, value, error, message):
    inputs = {"images": torch.zeros(2, 3, 8, 8), "time": torch.zeros(2), "labels": torch.zeros(2).long()}
    with pytest.raises(error, match=f"{name}: .*{message}"):
        ImageDiT(**SMALL)(**(inputs | {name: value}))


def test_make_mixer_keeps_the_shape():
    x = torch.randn(2, 1 + 12, 8)
    for kind in MIXERS:
        assert make_mixer(kind, 8, 2)(x, Grid(3, 4, registers=1)).shape == x.shape
