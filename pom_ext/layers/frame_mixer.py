"""Token mixers across the frames of a video, with a cache of constant size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import State
from ..ops.checks import accumulator
from .attention import Attention
from .layout import FULL_CONTEXT, FrameLayout, sum_first, swap_blocks
from .pom import PoM


class FrameMixer(PoM):
    """PoM over the frames of a video. Its cache is a `State` (B, G, C).

    With read="shared" it is what `ContextWindow.sum_earlier` takes. With read="split" it is the same of the past; then,
    if there is a sink, one group for the first frames; then, with `space_groups`, the same of the past of every block.

    Args:
        options: of `PoM`.
        sink: with read="split", number of first frames that never fade, and that a gate of their own reads.
        space_groups: with read="split", side g of blocks of patches. A token also reads, by a gate of its own, the past
            of its block of g x g patches, which fades as that of the whole frame does. 1: there are no blocks.

    Raises:
        ValueError: as `PoM`, or a sink or blocks without split read.
    """

    def __init__(self, *args, sink: int = 0, space_groups: int = 1, **options):
        super().__init__(*args, **options)
        for name, given, none in (("sink", sink, 0), ("space_groups", space_groups, 1)):
            if given != none and not self.split:
                raise ValueError(
                    f"{name}: expected {none} with read='shared', got {given}; read='split' has a gate for it"
                )
        self.sink, self.space_groups = sink, space_groups
        if sink:
            self.sink_gate_proj = nn.Linear(self.dim, self.gate_proj.out_features)
        if space_groups > 1:
            self.block_gate_proj = nn.Linear(self.dim, self.gate_proj.out_features)
        self.reset_past()

    @torch.no_grad()
    def reset_past(self) -> None:
        """As `PoM.reset_past`; half of the sink and of the past of the block is read too."""
        super().reset_past()
        for name in ("sink_gate_proj", "block_gate_proj"):
            projection = getattr(self, name, None)  # PoM's initialisation calls this before they are there
            if projection is not None:
                for parameter in projection.parameters():
                    parameter.zero_()

    def new_cache(
        self, batch: int, tokens: int, layout: FrameLayout, dtype: torch.dtype, device: torch.device | str
    ) -> State:
        """The cache before the first frame. Its size does not depend on `tokens`, the number of earlier tokens."""
        return self.new_past(batch, accumulator(dtype), device, sum(self._cached_groups(layout)))

    def _num_blocks(self, layout: FrameLayout) -> int:
        return layout.grid.height * layout.grid.width // self.space_groups**2 if self.space_groups > 1 else 0

    def _cached_groups(self, layout: FrameLayout) -> list[int]:
        """Groups of the cache: of the past, of the sink, of the past of all blocks."""
        window = layout.context_window.window
        past = window - 1 if window else 1
        return [past, int(self.sink > 0), past * self._num_blocks(layout)]

    def forward(self, x: Tensor, layout: FrameLayout, cache: State | None = None) -> tuple[Tensor, State]:
        """Mix tokens (B, T, S, D); also returns the cache after these frames."""
        if cache is not None and self._only_reads(x, layout):
            return self._read_past(x, layout, cache), cache
        each = layout.teacher_forced or layout.context_window != FULL_CONTEXT
        if each or (self.split and layout.causal):
            return self._mix_each_frame(x, layout, cache)
        frames = x.shape[2] if layout.causal and x.shape[1] > 1 else None  # one frame alone is a whole sequence
        positions = None if self.rope is None else layout.coordinates
        options = {"frames": frames, "positions": positions, "state": cache, "return_state": True}
        mixed: Tensor
        after: State
        mixed, after = super().forward(x.flatten(1, 2), **options)  # pyright: ignore[reportAssignmentType]
        # Cloned: a view would keep the states of all frames in memory.
        return mixed.view_as(x), after if frames is None else after.clone()

    def _only_reads(self, x: Tensor, layout: FrameLayout) -> bool:
        """Whether this is one frame of a stream that stays as it is, as in every evaluation of a solver."""
        alone = x.shape[1] == 1 and not layout.keeps and not layout.teacher_forced
        return self.split and alone and not layout.context_window.window and not self._num_blocks(layout)

    def _read_past(self, x: Tensor, layout: FrameLayout, cache: State) -> Tensor:
        """Mix the tokens of one frame (B, 1, S, D), which sees what is past as the cache has it."""
        tokens = x.flatten(1, 2)
        rotary, gate_rotary = self._rotaries(tokens, tokens, layout.coordinates if self.rope else None, None)
        means = [self.state_of(tokens, rotary=rotary).mean(), *cache.mean().split(1, dim=1)]
        return self.read_each(tokens, means, self._gate_projections(), rotary=gate_rotary).view_as(x)

    def _gate_projections(self) -> list[nn.Module]:
        """Those of the frame itself, of the past, of the sink and of the past of the block, as far as there are any."""
        gates: list[nn.Module] = [self.gate_proj, self.past_gate_proj]
        gates += [self.sink_gate_proj] if self.sink else []
        return gates + ([self.block_gate_proj] if self.space_groups > 1 else [])

    def _mix_each_frame(self, x: Tensor, layout: FrameLayout, cache: State | None) -> tuple[Tensor, State]:
        """Sum every frame alone, then let it see the earlier frames that the layout lets it see."""
        blocks, frames = self._num_blocks(layout), x.shape[1]
        positions = None if self.rope is None else layout.coordinates
        if blocks:  # patches of a block side by side
            x = swap_blocks(x, layout.grid, self.space_groups)
            if positions is not None:
                grouped = swap_blocks(positions.unflatten(0, (1, frames, -1)), layout.grid, self.space_groups)
                positions = grouped.flatten(0, 2)
        tokens = x.flatten(1, 2)  # (B, T * S, D)
        rotary, gate_rotary = self._rotaries(tokens, tokens, positions, None)
        offsets = torch.arange(0, tokens.shape[1] + 1, x.shape[2] // (blocks or 1), device=x.device)
        own = parts = self.state_of(tokens, cu_seqlens=offsets, rotary=rotary)  # (B, T * blocks, C)
        if blocks:
            own = parts.sum_groups(blocks)  # (B, T, C)
        fade = self.fade_of(layout.clean_frames(tokens), frames)
        clean = own.map(layout.clean_frames)
        if cache is None:
            cache = self.new_cache(clean.total.shape[0], 0, layout, own.total.dtype, x.device)
        past, first, past_blocks = cache.split(self._cached_groups(layout))
        earlier, past = layout.context_window.sum_earlier(past, clean, fade)
        seen, after = [earlier], [past]
        if self.sink:
            earlier, first = sum_first(first, clean, self.sink, x.shape[2])
            seen, after = [*seen, earlier], [*after, first]
        if blocks:
            clean = parts.map(layout.clean_frames)
            earlier, past_blocks = layout.context_window.sum_earlier_blocks(past_blocks, clean, blocks, fade)
            seen, after = [*seen, earlier], [*after, past_blocks]
        past = State.cat(after, dim=1) if len(after) > 1 else past
        if layout.teacher_forced:
            seen = [State.cat([state, state], dim=0) for state in seen]
        if not self.split:
            return self.read(tokens, seen[0] + own, rotary=gate_rotary).view_as(x), past
        means = [state.mean() for state in (own, *seen)]
        mixed = self.read_each(tokens, means, self._gate_projections(), rotary=gate_rotary).view_as(x)
        return swap_blocks(mixed, layout.grid, self.space_groups, back=True) if blocks else mixed, past


class HybridMixer(nn.Module):
    """Softmax attention inside each frame, plus a `FrameMixer` across frames. It has the cache of the latter.

    Its cost is quadratic in the tokens of a frame and linear in frames. The output of the attention starts at zero.

    Args:
        dim: width D of the tokens.
        n_heads: heads of the attention.
        across: the mixer across frames.
    """

    def __init__(self, dim: int, n_heads: int, across: FrameMixer):
        super().__init__()
        self.inside, self.across = Attention(dim, n_heads), across

    def new_cache(
        self, batch: int, tokens: int, layout: FrameLayout, dtype: torch.dtype, device: torch.device | str
    ) -> State:
        """See `FrameMixer.new_cache`."""
        return self.across.new_cache(batch, tokens, layout, dtype, device)

    def forward(self, x: Tensor, layout: FrameLayout, cache: State | None = None) -> tuple[Tensor, State]:
        """Mix tokens (B, T, S, D); also returns the cache after these frames."""
        mixed, after = self.across(x, layout, cache)
        return mixed + self.inside(x.flatten(0, 1), layout.grid).view_as(x), after
