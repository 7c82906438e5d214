"""Patches, positions and diffusion time: from pixels and numbers to tokens, and back.

Tokens are (B, N, D) for images and (B, T, S, D) for videos, with T frames of S = height * width patches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Grid

MAX_TIME = 1000  # diffusion time runs over [0, 1000]
SMOOTH = 0.02  # highest frequency of time in a model that is differentiated by it: 20 radians from data to noise

# Patches


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into patches, row by row; the channels of a pixel lie next to each other.

    Shapes: (B, C, H, W) -> (B, H/p * W/p, p * p * C).
    """
    blocks = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, H/p, p, W/p, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: Grid, patch: int) -> Tensor:
    """The inverse of `patchify`: (B, H/p * W/p, p * p * C) -> (B, C, H, W)."""
    blocks = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (grid.height, grid.width))  # (B, H/p, W/p, p, p, C)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patchify_video(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut a video into patches of t frames, h rows and w columns, in the order of `patchify`.

    Shapes: (B, C, T, H, W) -> (B, T/t, H/h * W/w, t * h * w * C).
    """
    t, h, w = patch
    parts = video.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # (B, C, T/t, t, H/h, h, W/w, w)
    return parts.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(2, 3)


def unpatchify_video(tokens: Tensor, grid: Grid, patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify_video`: (B, T/t, H/h * W/w, t * h * w * C) -> (B, C, T, H, W)."""
    parts = tokens.unflatten(3, (*patch, -1)).unflatten(2, (grid.height, grid.width))  # (B, T/t, H/h, W/w, t, h, w, C)
    return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


# Positions


def full_precision(like: Tensor) -> torch.dtype:
    """float32, or float64 if `like` is: half precision is too coarse for angles and for interpolation."""
    return torch.promote_types(like.dtype, torch.float32)


def unit_interval(length: int, **options: Any) -> Tensor:
    """(length,) numbers from 0 to 1. (torch.compile would compile torch.linspace anew for every length.)"""
    return torch.arange(length, **options) / max(length - 1, 1)


def sincos_positions(grid: Grid, dim: int, like: Tensor) -> Tensor:
    """Sine-cosine positions of the patches of an image.

    Coordinates run from 0 to 1 at any resolution; the angles are odd multiples of pi times the coordinate.

    Args:
        grid: the patches.
        dim: number of channels, a multiple of 4: the first half for columns, the second for rows.
        like: tensor whose dtype and device the result takes.

    Returns:
        (1, height * width, dim).

    Source: davidpicard/HoMM:src/model/network/imagediffusion.py, `sincos_embedding_2d`.
    """
    options = {"device": like.device, "dtype": full_precision(like)}
    frequencies = math.pi * (2 * torch.arange(dim // 4, **options) + 1)  # (D/4,)

    def embed(length: int) -> Tensor:
        angles = unit_interval(length, **options)[:, None] * frequencies  # (length, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (length, D/2)

    columns = embed(grid.width)[None, :].expand(grid.height, -1, -1)  # (h, w, D/2)
    rows = embed(grid.height)[:, None].expand(-1, grid.width, -1)  # (h, w, D/2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].to(like.dtype)  # (1, h * w, D)


def sincos_positions_3d(first: int, frames: int, length: int, grid: Grid, dim: int, like: Tensor) -> Tensor:
    """Sine-cosine positions of the patches of a video.

    Coordinates run from 0 to 1: in time over a whole clip, in space at any resolution. The angle of a coordinate is
    f (pi coordinate + 1) with frequencies f from 1/2 to 2.

    Args:
        first: number of the first frame.
        frames: number of frames T.
        length: number of frames of a whole clip.
        grid: the patches of a frame.
        dim: number of channels, a multiple of 8: half for time, a quarter each for columns and rows.
        like: tensor whose dtype and device the result takes.

    Returns:
        (1, T, height * width, dim).

    Source: davidpicard/HoMM, branch text2video.
    """
    options = {"device": like.device, "dtype": full_precision(like)}

    def embed(coordinates: Tensor, channels: int) -> Tensor:  # (n,) -> (n, channels)
        frequencies = torch.linspace(0.5, 2, channels // 2, **options)
        angles = (math.pi * coordinates + 1)[:, None] * frequencies  # (n, channels / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    times = torch.arange(first, first + frames, **options) / max(length - 1, 1)
    sizes = (frames, grid.height, grid.width, -1)
    time = embed(times, dim // 2)[:, None, None].expand(sizes)  # (T, h, w, D/2)
    column = embed(unit_interval(grid.width, **options), dim // 4)[None, None].expand(sizes)  # (T, h, w, D/4)
    row = embed(unit_interval(grid.height, **options), dim // 4)[None, :, None].expand(sizes)  # (T, h, w, D/4)
    return torch.cat([time, column, row], dim=-1).flatten(1, 2)[None].to(like.dtype)


class LearnedPositions(nn.Module):
    """One learned vector per patch of a side x side grid, resized (bicubic, antialiased) to any other grid."""

    def __init__(self, side: int, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(side, side, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> Tensor:  # -> (1, height * width, D)
        table = self.table
        if table.shape[:2] != (grid.height, grid.width):
            image = table.to(full_precision(table)).permute(2, 0, 1)[None]  # (1, D, side, side)
            image = F.interpolate(image, size=(grid.height, grid.width), mode="bicubic", antialias=True)
            table = image[0].permute(1, 2, 0).to(table.dtype)  # (h, w, D)
        return table.flatten(0, 1)[None]


# Diffusion time


def time_frequencies(dim: int, like: Tensor) -> Tensor:
    """(dim / 2,) angular frequencies exp(-2 log(1000) k / dim), at least in float32, on the device of `like`."""
    exponent = torch.arange(dim // 2, device=like.device, dtype=full_precision(like)) / dim
    return torch.exp(-2 * math.log(MAX_TIME) * exponent)


class TimeEmbedding(nn.Module):
    """Sine-cosine embedding of diffusion time, followed by two linear layers.

    Args:
        dim: width D of the result.
        fastest: highest angular frequency, in radians per unit of time.
    """

    def __init__(self, dim: int, fastest: float = 1.0):
        super().__init__()
        self.dim, self.fastest = dim, fastest
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, time: Tensor, like: Tensor) -> Tensor:
        """Embed times in [0, 1000], of any shape (...), as (..., D) in the dtype of `like`."""
        frequencies = self.fastest * time_frequencies(self.dim, like)  # (D/2,)
        angles = time.to(frequencies.dtype)[..., None] * frequencies  # (..., D/2)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype))  # (..., D)
