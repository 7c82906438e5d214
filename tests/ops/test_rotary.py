"""Angle tables and rotation, by their definition. (The authors' own numbers are in the golden vectors.)"""

import math

import pytest
import torch

from pom_ext import PoM
from pom_ext.ops import rotary_table
from pom_ext.ops.reference import rotate
from pom_ext.ops.rotary import AXES, BASE


@pytest.mark.parametrize("axes", (1, 2, 3))
def test_angles_by_hand(axes):
    """The angle of pair p on an axis is position / BASE^(p / half)."""
    positions = torch.tensor([[0.0, 1.0, 5.0], [2.5, 40.0, 0.25]])[:, :axes]
    channels = 17
    half = channels // (2 * axes)
    table = rotary_table(positions, channels, axes, dtype=torch.float64)
    assert table.cos.shape == table.sin.shape == (2, axes * half) and table.axes == axes
    for token in range(2):
        for axis in range(axes):
            for pair in range(half):
                angle = positions[token, axis].item() / BASE ** (pair / half)
                column = axis * half + pair
                assert table.cos[token, column].item() == pytest.approx(math.cos(angle), abs=2e-5)
                assert table.sin[token, column].item() == pytest.approx(math.sin(angle), abs=2e-5)


def test_one_axis_takes_flat_positions():
    positions = torch.arange(5)
    for flat, column in zip(rotary_table(positions, 8, 1), rotary_table(positions[:, None], 8, 1), strict=True):
        assert flat == column if isinstance(flat, int) else torch.equal(flat, column)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_dtype(dtype):
    table = rotary_table(torch.arange(3), 8, 1, dtype=dtype)
    assert table.cos.dtype == table.sin.dtype == dtype


@pytest.mark.parametrize("axes", (1, 2, 3))
@pytest.mark.parametrize("channels", (12, 17, 34))
def test_rotation(channels, axes):
    """It turns pairs: lengths stay, position 0 changes nothing, and channels past the last pair are left alone."""
    x = torch.randn(2, 9, channels, dtype=torch.float64)
    positions = torch.rand(9, axes) * 50
    positions[0] = 0
    table = rotary_table(positions, channels, axes, dtype=torch.float64)
    turned, half = rotate(x, *table), channels // (2 * axes)
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    assert torch.equal(turned[..., 2 * half * axes :], x[..., 2 * half * axes :])
    assert not torch.allclose(turned[:, 1:, : 2 * half * axes], x[:, 1:, : 2 * half * axes])
    for axis in range(axes):
        low, high = 2 * half * axis, 2 * half * axis + half
        before = torch.complex(x[..., low : low + half], x[..., high : high + half])
        after = torch.complex(turned[..., low : low + half], turned[..., high : high + half])
        columns = slice(axis * half, axis * half + half)
        torch.testing.assert_close(after, before * torch.complex(table.cos, table.sin)[:, columns])


def test_products_depend_on_distance_alone():
    """What two tokens have to do with each other is a function of how far apart they are."""
    a, b = torch.randn(2, 1, 1, 32, dtype=torch.float64)

    def product(i, j):
        first, second = (rotate(x, *rotary_table(torch.tensor([p]), 32, 1)) for x, p in ((a, i), (b, j)))
        return (first * second).sum().item()

    assert product(3, 10) == pytest.approx(product(20, 27), abs=1e-5)
    assert abs(product(3, 10) - product(3, 11)) > 1e-3


@pytest.mark.parametrize("axes", (1, 2))
def test_a_head_turns_with_the_leading_frequency_of_its_channels(axes):
    """One scalar gate a head: pair p of the gates takes every stride-th frequency of the features' table."""
    width, heads = 64, 8
    stride = width // heads // 2 * axes
    positions = torch.rand(5, axes) * 20
    features = rotary_table(positions, width, axes).cos.unflatten(-1, (axes, -1))
    gates = rotary_table(positions, heads, axes, stride, table_channels=width).cos.unflatten(-1, (axes, -1))
    assert gates.shape[-1] == heads // (2 * axes)
    assert torch.equal(gates, features[..., ::stride][..., : gates.shape[-1]])


def test_fractional_and_far_positions():
    table = rotary_table(torch.tensor([0.5, -3.0, 1e6]), 16, 1)
    assert table.cos.isfinite().all()
    torch.testing.assert_close(table.cos**2 + table.sin**2, torch.ones(3, 8))


@pytest.mark.parametrize("rope", AXES)
@pytest.mark.parametrize("heads", (1, 8))
def test_the_layer_sees_positions(rope, heads, device):
    """Tokens at other positions give another output, the same positions given explicitly the same."""
    layer = PoM(16, 2, 2, form="power", n_sel_heads=heads, rope=rope).to(device)
    x = torch.randn(2, 6, 16, device=device)
    positions = torch.stack([torch.arange(6.0) * (axis + 1) for axis in range(AXES[rope])], dim=-1).to(device)
    y = layer(x, positions=positions)
    assert not torch.allclose(y, layer(x, positions=positions * 2))
    assert torch.equal(y, layer(x, x.clone(), positions=positions, context_positions=positions))
    if rope == "1d":
        assert torch.equal(y, layer(x)) and torch.equal(y, layer(x, positions=positions[:, 0]))
