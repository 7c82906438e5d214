"""Depthwise 3x3 convolutions of patches: each patch sees its neighbours, in its frame and in the frames before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import FrameLayout, Grid

MOST_EARLIER = 2  # frames before its own that the local convolution of a video may see


class LocalConv(nn.Module):
    """x + depthwise 3x3 convolution of the patches, which starts at zero. Registers stay as they are.

    Tokens (B, N, D) seen as (B, D, H, W) are already in torch's channels-last format, so nothing is transposed.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # (B, R + N, D) -> (B, R + N, D)
        patches = x[:, grid.registers :]  # (B, N, D)
        image = patches.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)  # (B, D, h, w), a view
        patches = patches + self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, D)
        return torch.cat([x[:, : grid.registers], patches], dim=1) if grid.registers else patches


class FrameConv(nn.Module):
    """x + depthwise 3x3 convolution of the patches over a frame and some frames before it, which starts at zero.

    Tokens (B, T, S, D) seen as (B, D, T, h, w) are already in torch's channels-last format, so nothing is transposed.

    Args:
        dim: width D of the tokens.
        earlier: number of frames before its own that a frame sees, 0 to 2.
    """

    def __init__(self, dim: int, earlier: int = MOST_EARLIER):
        super().__init__()
        self.earlier = earlier
        self.conv = nn.Conv3d(dim, dim, kernel_size=(earlier + 1, 3, 3), padding=(0, 1, 1), groups=dim)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def new_cache(self, batch: int, patches: int, dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
        """The cache before the first frame: zeros, or None for a convolution that sees no earlier frame."""
        if not self.earlier:
            return None
        return torch.zeros(batch, self.earlier, patches, self.conv.in_channels, dtype=dtype, device=device)

    def forward(self, x: Tensor, layout: FrameLayout, cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Convolve tokens (B, T, S, D). The cache holds the last `earlier` frames (B, earlier, S, D)."""
        sizes = layout.grid.height, layout.grid.width
        if not self.earlier:
            frames = x.flatten(0, 1).unflatten(1, sizes).permute(0, 3, 1, 2)  # (B * T, D, h, w), a view
            conv = self.conv
            change = F.conv2d(frames, conv.weight[:, :, 0], conv.bias, padding=1, groups=conv.groups)
            return x + change.permute(0, 2, 3, 1).reshape(x.shape), None
        clean = layout.clean_frames(x)
        if cache is None:
            cache = self.new_cache(clean.shape[0], x.shape[2], x.dtype, x.device)
            assert cache is not None
        padded = torch.cat([cache, clean], dim=1)  # (B, earlier + T, S, D)
        video = padded.unflatten(2, sizes).permute(0, 4, 1, 2, 3)  # (B, D, earlier + T, h, w), a view
        change = self.conv(video).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, S, D)
        if layout.teacher_forced:  # a noisy frame replaces the clean one under the kernel's last slice only
            noise = (x.chunk(2)[1] - clean).flatten(0, 1).unflatten(1, sizes).permute(0, 3, 1, 2)  # (B * T, D, h, w)
            noise = F.conv2d(noise, self.conv.weight[:, :, -1], padding=1, groups=noise.shape[1])
            change = torch.cat([change, change + noise.permute(0, 2, 3, 1).reshape(change.shape)])
        return x + change, padded[:, clean.shape[1] :]
