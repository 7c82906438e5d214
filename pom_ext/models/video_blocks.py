"""What the video transformer is built from, beside `blocks`: patches and positions in time, mixers with a memory, the block.

Tokens are (B, T, S, D): T frames of S = height x width patches.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import PoM
from ..ops import State
from ..ops.checks import accumulator
from .blocks import AdaLN, Attention, Block, Gate, Grid, attend, full_precision, unit_interval
from .cache import FORGET_NOTHING, Forgetting, KeyValues

KERNEL = 3  # frames that the local convolution sees: its own and the ones before


# Patches and positions


def patchify_video(video, patch):
    """(B, C, T, H, W) -> (B, T/t, H/h * W/w, t * h * w * C): patches row by row, the channels of a pixel side by side."""
    t, h, w = patch
    parts = video.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # (B, C, T/t, t, H/h, h, W/w, w)
    return parts.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(2, 3)


def unpatchify_video(tokens, grid, patch):
    """The inverse of `patchify_video`: (B, T/t, H/h * W/w, t * h * w * C) -> (B, C, T, H, W)."""
    parts = tokens.unflatten(3, (*patch, -1)).unflatten(2, (grid.height, grid.width))  # (B, T/t, H/h, W/w, t, h, w, C)
    return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


def sincos_positions_3d(first, frames, length, grid, dim, like):
    """(1, frames, height * width, dim) sine-cosine positions of the frames from number `first` on.

    Coordinates run from 0 to 1: in time over the `length` frames of a whole clip, in space whatever the resolution.
    Half the channels tell the time, a quarter the column, a quarter the row; the frequencies f lie between 1/2 and 2
    and the angle is f (pi coordinate + 1), as in davidpicard/HoMM, branch text2video. dim is a multiple of 8.
    """
    options = {"device": like.device, "dtype": full_precision(like)}

    def embed(coordinates, channels):  # (n,) -> (n, channels)
        frequencies = torch.linspace(0.5, 2, channels // 2, **options)
        angles = (math.pi * coordinates + 1)[:, None] * frequencies  # (n, channels / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    times = torch.arange(first, first + frames, **options) / max(length - 1, 1)
    sizes = (frames, grid.height, grid.width, -1)
    time = embed(times, dim // 2)[:, None, None].expand(sizes)  # (T, h, w, D/2)
    column = embed(unit_interval(grid.width, **options), dim // 4)[None, None].expand(sizes)  # (T, h, w, D/4)
    row = embed(unit_interval(grid.height, **options), dim // 4)[None, :, None].expand(sizes)  # (T, h, w, D/4)
    return torch.cat([time, column, row], dim=-1).flatten(1, 2)[None].to(like.dtype)


def coordinates_3d(first, frames, grid, device):
    """(frames * height * width, 3) frame, row and column of every token, for rotary positions."""
    spans = ((first, first + frames), (0, grid.height), (0, grid.width))
    return torch.cartesian_prod(*(torch.arange(*span, device=device) for span in spans))


class Layout(NamedTuple):
    """How the frames of a call lie, and who sees whom.

    grid: the patches of a frame.
    causal: a token sees the frames up to and with its own, instead of all.
    paired: the first half of the batch are finished frames, the second half the same frames, still noisy: both see the
        finished frames before their own, and their own frame as it is. For causal=True.
    forgetting: which of the frames before are seen, and how much.
    coordinates: (T * S, 3) of every token, for rotary positions.
    """

    grid: Grid
    causal: bool = False
    paired: bool = False
    forgetting: Forgetting = FORGET_NOTHING
    coordinates: torch.Tensor | None = None

    def finished(self, x):
        """The finished half of the batch."""
        return x.chunk(2)[0] if self.paired else x


# Mixers: (B, T, S, D) tokens and the memory of what came before -> (B, T, S, D) and the memory after them


class FrameMixer(PoM):
    """PoM over frames; its memory is a `State`, as `Forgetting.sums` takes it."""

    def empty_memory(self, batch, tokens, forgetting, dtype, device):
        """The memory of no frames. `tokens` does not matter: a state is as large after many."""
        groups = forgetting.window - 1 if forgetting.window else 1
        return State.empty(batch, self.state_width, groups, dtype=accumulator(dtype), device=device)

    def forward(self, x, layout, memory=None):
        tokens = x.flatten(1, 2)  # (B, T * S, D)
        positions = None if self.rope is None else layout.coordinates
        if layout.paired or layout.forgetting != FORGET_NOTHING:
            mixed, memory = self._mix_each(tokens, x.shape[2], positions, layout, memory)
            return mixed.view_as(x), memory
        frames = x.shape[2] if layout.causal and x.shape[1] > 1 else None  # one frame alone is a whole sequence
        mixed, memory = super().forward(tokens, frames=frames, positions=positions, state=memory, return_state=True)
        if frames is not None:
            memory = memory.clone()  # a view would keep the states of all frames
        return mixed.view_as(x), memory

    def _mix_each(self, tokens, size, positions, layout, memory):
        """The sums of every frame by itself, put together with those before as the layout says."""
        rotary, gate_rotary = self._rotaries(tokens, tokens, positions, None)
        offsets = torch.arange(0, tokens.shape[1] + 1, size, device=tokens.device)
        own = self.state_of(tokens, cu_seqlens=offsets, rotary=rotary)  # (B, T, C)
        finished = own.map(layout.finished)
        if memory is None:
            memory = self.empty_memory(finished.total.shape[0], 0, layout.forgetting, own.total.dtype, tokens.device)
        before, memory = layout.forgetting.sums(memory, finished)
        if layout.paired:
            before = State.cat([before, before], dim=0)
        return self.read(tokens, before + own, rotary=gate_rotary), memory


class FrameAttention(Attention):
    """Attention with the same choices of who sees whom; its memory is a key-value cache. The yardstick."""

    def empty_memory(self, batch, tokens, forgetting, dtype, device):
        """A memory of so many tokens, all of them zero."""
        return KeyValues(*torch.zeros(2, batch, tokens, self.out_proj.out_features, dtype=dtype, device=device))

    def extend(self, memory, keys, values):
        """Keys and values of the memory and, behind them, these."""
        if memory is None:
            return keys, values
        return torch.cat([memory.keys, keys], dim=1), torch.cat([memory.values, values], dim=1)

    def forward(self, x, layout, memory=None):
        frames, size = x.shape[1:3]
        window = layout.forgetting.window
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)  # (B, T * S, D)
        keys, values = self.extend(memory, layout.finished(k), layout.finished(v))  # (B, N, D)
        mask = None
        if layout.causal and (frames > 1 or layout.paired):
            frame = torch.arange(keys.shape[1], device=x.device) // size  # (N,)
            own = frame[-q.shape[1] :, None]  # (T * S, 1)
            mask = (frame <= own) & (frame > own - window if window else True)  # (T * S, N)
        if layout.paired:
            (q, noisy), (_, noisy_keys), (_, noisy_values) = (t.chunk(2) for t in (q, k, v))
            both = torch.cat([keys, noisy_keys], dim=1), torch.cat([values, noisy_values], dim=1)  # (B, N + T * S, D)
            before = torch.cat([mask & (frame < own), frame[-q.shape[1] :] == own], dim=1)  # (T * S, N + T * S)
            noisy = attend(noisy, *both, self.heads, before)  # (B, T * S, D)
        mixed = attend(q, keys, values, self.heads, mask)  # (B, T * S, D)
        if layout.paired:
            mixed = torch.cat([mixed, noisy])
        first = max(0, keys.shape[1] - (window - 1) * size) if window else 0
        memory = KeyValues(keys[:, first:].contiguous(), values[:, first:].contiguous())
        return self.out_proj(mixed).view_as(x), memory


class CrossAttention(nn.Module):
    """Attention of x (B, M, D) over context (B, N, D) with weights (B, N); no weight at all reads as a zero vector."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.kv_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context, *, weight=None):
        k, v = self.kv_proj(context).chunk(2, dim=-1)  # (B, N, D)
        if weight is None:
            weight = x.new_ones(context.shape[:2])
        seen = weight.any(dim=1)[:, None, None]  # (B, 1, 1)
        bias = torch.where(seen, weight.log()[:, None], 0).to(x.dtype)  # (B, 1, N)
        mixed = attend(self.q_proj(x), k, v, self.heads, bias[:, None])  # (B, M, D)
        return self.out_proj(torch.where(seen, mixed, 0))


class FrameConv(nn.Module):
    """x + depthwise 3x3x3 convolution of the patches, causal: it sees its own frame and the two before.

    Zero-initialised. Tokens (B, T, S, D) seen as (B, D, T, h, w) are already in torch's channels-last format.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, kernel_size=KERNEL, padding=(0, 1, 1), groups=dim)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x, layout, tail=None):
        """(B, T, S, D) and the two frames before, None at the start -> (B, T, S, D) and the last two frames."""
        finished = layout.finished(x)
        if tail is None:
            tail = finished.new_zeros(finished.shape[0], KERNEL - 1, *x.shape[2:])
        padded = torch.cat([tail, finished], dim=1)  # (B, 2 + T, S, D)
        sizes = layout.grid.height, layout.grid.width
        video = padded.unflatten(2, sizes).permute(0, 4, 1, 2, 3)  # (B, D, 2 + T, h, w), a view
        change = self.conv(video).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, S, D)
        if layout.paired:  # the noisy frame stands in the place of the finished one, and only there
            noise = (x.chunk(2)[1] - finished).flatten(0, 1).unflatten(1, sizes).permute(0, 3, 1, 2)  # (B * T, D, h, w)
            noise = F.conv2d(noise, self.conv.weight[:, :, -1], padding=1, groups=noise.shape[1])
            change = torch.cat([change, change + noise.permute(0, 2, 3, 1).reshape(change.shape)])
        return x + change, padded[:, finished.shape[1] :]


class VideoBlock(Block):
    """Text cross-mixing, where there is text; then the block of the image model, over frames.

    The text is normalised and modulated too. All three branches are gated; the local convolution is not.
    """

    def __init__(self, dim, mixer, ffw_expand=4, local_conv=None, cross_mixer=None):
        super().__init__(dim, mixer, ffw_expand, local_conv)
        self.cross_mixer = cross_mixer
        if cross_mixer is not None:
            self.cross_norm, self.text_norm, self.cross_gate = AdaLN(dim), AdaLN(dim), Gate(dim, dim)

    def _read_text(self, x, cond, text, weight):
        """Every token reads the text (B, L, D) as the condition (B, 1 or T, 1, D) of its frame modulates it."""
        text = self.text_norm(text[:, None], cond)  # (B, 1 or T, L, D)
        groups = text.shape[1]
        frames = x.shape[1] // groups  # that share a condition
        queries = self.cross_norm(x, cond).reshape(-1, frames * x.shape[2], x.shape[3])  # (B * groups, frames * S, D)
        if weight is not None:
            weight = weight.repeat_interleave(groups, dim=0)  # (B * groups, L)
        return self.cross_mixer(queries, text.flatten(0, 1), weight=weight).view_as(x)

    def forward(self, x, cond, layout, text=None, text_weight=None, memory=None, tail=None):
        """-> (B, T, S, D), the memory of the mixer after these frames and the tail of the convolution."""
        if text is not None:
            x = torch.addcmul(x, self.cross_gate(cond), self._read_text(x, cond, text, text_weight))  # (B, T, S, D)
        if self.local_conv is not None:
            x, tail = self.local_conv(x, layout, tail)  # (B, T, S, D), (B, 2, S, D)
        mixed, memory = self.mixer(self.mixer_norm(x, cond), layout, memory)  # (B, T, S, D)
        x = torch.addcmul(x, self.mixer_gate(cond), mixed)  # (B, T, S, D)
        return torch.addcmul(x, self.ffw_gate(cond), self.ffw(self.ffw_norm(x, cond))), memory, tail  # (B, T, S, D)
