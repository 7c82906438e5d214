"""Where the tokens of a sequence lie in space and time, and which earlier frames a frame sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import State


class Grid(NamedTuple):
    """The tokens of one picture: first `registers` extra tokens, then height x width patches, row by row."""

    height: int
    width: int
    registers: int = 0

    def coordinates(self, first: int, frames: int, device: torch.device | str) -> Tensor:
        """(frames * height * width, 3) frame, row and column of every patch from frame `first` on."""
        ranges = ((first, first + frames), (0, self.height), (0, self.width))
        return torch.cartesian_prod(*(torch.arange(*bounds, device=device) for bounds in ranges))


class ContextWindow(NamedTuple):
    """Which earlier frames a frame sees, and how much each of them counts. By default it sees all of them alike.

    Attributes:
        window: a frame sees itself and the `window` - 1 frames before it; 0: itself and all frames before it.
        decay: factor above 0 and at most 1 by which earlier frames count less with every new frame.
    """

    window: int = 0
    decay: float = 1.0

    def sum_earlier(self, cache: State, own: State, fade: Tensor | None = None) -> tuple[State, State]:
        """Sums over the earlier frames that each of T frames sees.

        Args:
            cache: State (B, G, C) of the frames before these, as the next frame counts them. G is 1, for the sum of
                all, or with a window `window` - 1, for the last frames one by one.
            own: State (B, T, C), the sums of every frame alone.
            fade: (R,) or (B, T, R), the share of what is past that is left when each of the T frames is added, for
                each of R equal parts of the channels. The cache then has R counts (B, G, R). Not with a window.

        Returns:
            State (B, T, C) of what each frame sees of earlier frames, and the cache (B, G, C) after the T frames.
        """
        frames, cached = own.count.shape[1], cache.count.shape[1]
        if fade is not None:
            own = own.fading(fade.shape[-1])
        parts = State.cat([cache, own], dim=1)  # (B, G + T, C)

        def before(parts: Tensor) -> Tensor:  # (B, G + T, ...) -> (B, T + 1, ...)
            if self.window:
                return parts.unfold(1, cached, 1).sum(-1)
            if fade is not None:
                left = self.decay * fade.to(parts.dtype).repeat_interleave(parts.shape[2] // fade.shape[-1], dim=-1)
                sums = [parts[:, 0]]
                for frame in range(frames):
                    left_now = left if left.dim() == 1 else left[:, frame]
                    sums.append(torch.addcmul(parts[:, frame + 1], left_now, sums[-1]))
                return torch.stack(sums, dim=1)
            if self.decay == 1:
                return parts.cumsum(dim=1)
            sums = [parts[:, 0]]
            for part in parts[:, 1:].unbind(1):
                sums.append(self.decay * (sums[-1] + part))
            return torch.stack(sums, dim=1)

        # In float64, total + residual is a single number. The sum of a window is computed anew for every frame, not
        # updated by subtraction, so frames that left the window leave no rounding error behind.
        exact = parts.to(torch.float64)
        total = before(exact.total)
        sums = State(total, torch.zeros_like(total), before(exact.count)).to(own.total.dtype)
        earlier = sums.map(lambda t: t[:, :frames])
        # Cloned: a view would keep the sums of all frames in memory.
        return earlier, (parts if self.window else sums).map(lambda t: t[:, frames:].clone())

    def sum_earlier_blocks(
        self, cache: State, own: State, blocks: int, fade: Tensor | None = None
    ) -> tuple[State, State]:
        """`sum_earlier` of every block of a frame alone, for a cache (B, G * blocks, C) and own (B, T * blocks, C)."""
        batch = own.total.shape[0]

        def apart(sums: Tensor) -> Tensor:  # (B, G * blocks, ...) -> (B * blocks, G, ...)
            return sums.unflatten(1, (-1, blocks)).transpose(1, 2).flatten(0, 1)

        def together(sums: Tensor) -> Tensor:
            return sums.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(1, 2)

        if fade is not None and fade.dim() == 3:
            fade = fade.repeat_interleave(blocks, dim=0)
        earlier, cache = self.sum_earlier(cache.map(apart), own.map(apart), fade)
        return earlier.map(together), cache.map(together)


FULL_CONTEXT = ContextWindow()


def swap_blocks(x: Tensor, grid: Grid, side: int, *, back: bool = False) -> Tensor:
    """Patches (B, T, S, D) in the order of their blocks of side x side, row by row; `back` undoes it."""
    height, width = grid.height // side, grid.width // side
    sizes = (height, width, side, side) if back else (height, side, width, side)
    return x.unflatten(2, sizes).transpose(3, 4).flatten(2, 5)


def frame_means(x: Tensor, frames: int | Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean token of each frame of x (B, N, D), weighted by (B, N): (B, T, D), 0 where there is no weight.

    `frames` is their number T, for frames of one length, or their offsets (T + 1,).
    """
    weight = x.new_ones(1, x.shape[1]) if weight is None else weight.to(x.dtype)
    if isinstance(frames, Tensor):
        token = torch.arange(x.shape[1], device=x.device)
        inside = (frames[:-1, None] <= token) & (token < frames[1:, None])  # (T, N)
        weight = weight[:, None] * inside  # (B, T, N)
        with torch.autocast(x.device.type, enabled=False):
            total, count = weight @ x, weight.sum(-1, keepdim=True)
    else:
        sizes = frames, x.shape[1] // frames
        weight = weight.unflatten(1, sizes)[..., None]  # (B, T, N / T, 1)
        total, count = (weight * x.unflatten(1, sizes)).sum(2), weight.sum(2)
    return total / torch.where(count == 0, 1, count)


def sum_first(cache: State, own: State, frames: int, size: int) -> tuple[State, State]:
    """Sums over the first frames of a stream, as each of T frames sees them: all of the first that are earlier.

    Args:
        cache: State (B, 1, C) of the first frames among those before these. It may have counts (B, 1, R), all alike.
        own: State (B, T, C), the sums of every frame alone.
        frames: number of first frames.
        size: tokens of a frame.

    Returns:
        State (B, T, C) of what each frame sees of the first frames, and the cache (B, 1, C) after the T frames.
    """
    number = torch.arange(own.count.shape[1], device=own.count.device)
    own = own.fading(cache.count.shape[2]) if cache.fades else own
    seen = cache.count[:, :, 0] if cache.fades else cache.count  # (B, 1)
    counted = seen + size * number < size * frames  # (B, T); told by the count, not by the host
    return FULL_CONTEXT.sum_earlier(
        cache, own.map(lambda t: torch.where(counted if t.dim() == 2 else counted[..., None], t, 0))
    )


class FrameLayout(NamedTuple):
    """How the frames of a forward pass lie, and which frames a token sees.

    Attributes:
        grid: the patches of a frame.
        causal: a token sees its own frame and earlier ones, instead of all frames.
        teacher_forced: the first half of the batch holds the clean frames of a video, the second half the same frames
            with noise. Both see the earlier clean frames, and their own frame as it is in their half. Needs `causal`.
        context_window: which earlier frames are seen, and how much they count.
        coordinates: (T * S, 3) frame, row and column of every token, for rotary positions.
        keeps: whether the caches after these frames are wanted.
    """

    grid: Grid
    causal: bool = False
    teacher_forced: bool = False
    context_window: ContextWindow = FULL_CONTEXT
    coordinates: Tensor | None = None
    keeps: bool = True

    def clean_frames(self, x: Tensor) -> Tensor:
        """The clean half of the batch of `x`; all of it without teacher forcing."""
        return x.chunk(2)[0] if self.teacher_forced else x
