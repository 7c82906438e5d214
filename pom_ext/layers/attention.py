"""Attention as a token mixer of images and videos: the baseline of the polynomial mixer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import FrameLayout, Grid


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention.

    Args:
        q: (B, M, D) queries.
        k: (B, N, D) keys.
        v: (B, N, D) values.
        heads: number of heads, a divisor of D.
        mask: broadcast to (B, heads, M, N); True if a query sees a key, or a number added to the score.

    Returns:
        (B, M, D).
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, ., D / heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # (B, M, D)


class Attention(nn.Module):
    """Multi-head self-attention of all tokens, quadratic in their number (facebookresearch/DiT:models.py).

    Args:
        dim: width D of the tokens.
        heads: number of heads, a divisor of `dim`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D)
        return self.out_proj(attend(q, k, v, self.heads))


class LocalAttention(Attention):
    """Attention inside windows of window x window patches: linear in tokens.

    Registers are keys of every window and attend to every token, so they carry information between windows. A shifted
    layer moves the windows by half their side; alternating the two connects neighbouring windows. If the windows do
    not divide the grid, it is padded, and the padding is masked.

    Args:
        dim: width D of the tokens.
        heads: number of heads.
        window: side of a window, in patches.
        shifted: whether the windows are moved.
    """

    def __init__(self, dim: int, heads: int, window: int = 8, shifted: bool = False):
        super().__init__(dim, heads)
        self.window, self.shift = window, window // 2 if shifted else 0

    def _split(self, image: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, windows, window * window, C), padded with zeros."""
        height, width = image.shape[1:3]
        bottom, right = (-(height + self.shift) % self.window, -(width + self.shift) % self.window)
        image = F.pad(image, (0, 0, self.shift, right, self.shift, bottom))
        image = image.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))  # (B, H/w, w, W/w, w, C)
        return image.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _join(self, windows: Tensor, grid: Grid) -> Tensor:
        """The inverse of `_split`: (B, windows, window * window, C) -> (B, H, W, C)."""
        image = windows.unflatten(1, (-(-(grid.height + self.shift) // self.window), -1))
        image = image.unflatten(3, (self.window, self.window)).transpose(2, 3)  # (B, H/w, w, W/w, w, C)
        image = image.flatten(3, 4).flatten(1, 2)
        return image[:, self.shift : self.shift + grid.height, self.shift : self.shift + grid.width]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # (B, R + N, D) -> (B, R + N, D)
        registers, patches = self.qkv(x).split([grid.registers, grid.height * grid.width], dim=1)  # (B, ., 3D)
        windows = self._split(patches.unflatten(1, (grid.height, grid.width)))  # (B, windows, w * w, 3D)
        count = windows.shape[1]
        q = windows.flatten(0, 1).chunk(3, dim=-1)[0]  # (B * windows, w * w, D)
        seen = torch.cat([registers[:, None].expand(-1, count, -1, -1), windows], dim=2)  # (B, windows, R + w * w, 3D)
        _, k, v = seen.flatten(0, 1).chunk(3, dim=-1)  # (B * windows, R + w * w, D)
        mask = None
        if windows.shape[1] * windows.shape[2] != patches.shape[1]:  # padded
            real = self._split(x.new_ones(1, grid.height, grid.width, 1))[..., 0].bool()  # (1, windows, w * w)
            real = F.pad(real, (grid.registers, 0), value=True)  # (1, windows, R + w * w)
            mask = real.expand(x.shape[0], -1, -1).flatten(0, 1)[:, None, None]  # (B * windows, 1, 1, R + w * w)
        mixed = attend(q, k, v, self.heads, mask).unflatten(0, (x.shape[0], count))  # (B, windows, w * w, D)
        mixed = self._join(mixed, grid).flatten(1, 2)  # (B, N, D)
        if grid.registers:
            _, k, v = torch.cat([registers, patches], dim=1).chunk(3, dim=-1)  # (B, R + N, D)
            summary = attend(registers.chunk(3, dim=-1)[0], k, v, self.heads)  # (B, R, D)
            mixed = torch.cat([summary, mixed], dim=1)  # (B, R + N, D)
        return self.out_proj(mixed)


class KeyValues(NamedTuple):
    """The cache of attention: keys and values (B, N, D) of every earlier token. It grows with every frame."""

    keys: Tensor
    values: Tensor

    def clone(self) -> KeyValues:
        return KeyValues(self.keys.clone(), self.values.clone())

    def to(self, device: torch.device | str) -> KeyValues:
        return KeyValues(self.keys.to(device), self.values.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        return self._asdict()


class FrameAttention(Attention):
    """Attention over frames, with the same choices of who sees whom as `FrameMixer`, and a key-value cache."""

    def new_cache(
        self, batch: int, tokens: int, layout: FrameLayout, dtype: torch.dtype, device: torch.device | str
    ) -> KeyValues:
        """The cache of `tokens` tokens, with zeros for keys and values."""
        return KeyValues(*torch.zeros(2, batch, tokens, self.out_proj.out_features, dtype=dtype, device=device))

    def extend(self, cache: KeyValues | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of the cache, followed by those of new tokens."""
        if cache is None:
            return keys, values
        return torch.cat([cache.keys, keys], dim=1), torch.cat([cache.values, values], dim=1)

    def forward(self, x: Tensor, layout: FrameLayout, cache: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        """Mix tokens (B, T, S, D); also returns the cache after these frames."""
        frames, size = x.shape[1:3]
        window = layout.context_window.window
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)  # (B, T * S, D)
        keys, values = self.extend(cache, layout.clean_frames(k), layout.clean_frames(v))  # (B, N, D)
        mask = noisy = None
        if layout.causal and (frames > 1 or layout.teacher_forced):
            frame = torch.arange(keys.shape[1], device=x.device) // size  # (N,)
            own = frame[-q.shape[1] :, None]  # (T * S, 1)
            mask = (frame <= own) & (frame > own - window if window else True)  # (T * S, N)
            if layout.teacher_forced:  # noisy frames see earlier clean frames and themselves
                (q, noisy_q), (_, noisy_k), (_, noisy_v) = (t.chunk(2) for t in (q, k, v))
                both = torch.cat([keys, noisy_k], dim=1), torch.cat([values, noisy_v], dim=1)  # (B, N + T * S, D)
                seen = torch.cat([mask & (frame < own), frame[-q.shape[1] :] == own], dim=1)  # (T * S, N + T * S)
                noisy = attend(noisy_q, *both, self.heads, seen)  # (B, T * S, D)
        mixed = attend(q, keys, values, self.heads, mask)  # (B, T * S, D)
        if noisy is not None:
            mixed = torch.cat([mixed, noisy])
        first = max(0, keys.shape[1] - (window - 1) * size) if window else 0
        cache = KeyValues(keys[:, first:].contiguous(), values[:, first:].contiguous())
        return self.out_proj(mixed).view_as(x), cache


class CrossAttention(nn.Module):
    """Attention of tokens over a context with weights. If all weights of a sample are 0, it reads a zero vector."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.kv_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Read context (B, N, D) with weights (B, N), at least 0, for tokens x (B, M, D); returns (B, M, D)."""
        k, v = self.kv_proj(context).chunk(2, dim=-1)  # (B, N, D)
        if weight is None:
            weight = x.new_ones(context.shape[:2])
        seen = weight.any(dim=1)[:, None, None]  # (B, 1, 1)
        bias = torch.where(seen, weight.log()[:, None], 0).to(x.dtype)  # (B, 1, N)
        mixed = attend(self.q_proj(x), k, v, self.heads, bias[:, None])  # (B, M, D)
        return self.out_proj(torch.where(seen, mixed, 0))
