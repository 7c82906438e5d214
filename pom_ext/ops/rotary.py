"""Angle tables for rotary positions, in the convention of davidpicard/pom:pom/pom_rope.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10000.0
AXES = {"1d": 1, "2d": 2, "3d": 3}


class Rotary(NamedTuple):
    """Angles of every token: cos and sin (N, axes * half), for channel pairs as in `reference.rotate`."""

    cos: Tensor
    sin: Tensor
    axes: int


def rotary_table(
    positions: Tensor,
    channels: int,
    axes: int,
    stride: int = 1,
    *,
    table_channels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """Angles for `channels` channels at `positions` (N,) or (N, axes).

    With one gate per head the gate's pairs take every `stride`-th frequency of the features' table
    (`table_channels` wide), so that the gate of a head rotates with the leading frequency of its channels.
    Positions may be fractional and of any size. The angles are computed in float32, as the authors' are:
    their checkpoints were trained with exactly these numbers.

    Args:
        positions: (N,) or (N, axes) coordinates, of any real dtype; their unit is one token, row, column or frame.
        channels: number of channels to rotate; those past 2 * axes * half stay as they are.
        axes: 1, 2 or 3 coordinates for each token.
        stride: step through the frequencies, see above.
        table_channels: width of the features' table; None takes `channels`.
        dtype: of the result.

    Returns:
        Rotary with cos and sin (N, axes * half) in `dtype`, on the device of the positions.

    Source: davidpicard/pom:pom/pom_rope.py.
    """
    half = channels // (2 * axes)
    table_half = (table_channels or channels) // (2 * axes)
    exponent = torch.arange(0, table_half, dtype=torch.float32, device=positions.device) / table_half
    frequencies = (1.0 / BASE**exponent)[::stride][:half]
    angles = positions.reshape(-1, axes, 1).to(torch.float32) * frequencies  # (N, axes, half)
    return Rotary(angles.cos().flatten(1).to(dtype), angles.sin().flatten(1).to(dtype), axes)
