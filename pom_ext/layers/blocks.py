"""Blocks of the image and video transformers: polynomial mixers, local convolutions, adaptive LayerNorm, gates.

Tokens are (B, N, D) for images and (B, T, S, D) for videos, with T frames of S = height * width patches. Modules that
need to know where the tokens lie take a `Grid` (images) or a `FrameLayout` (videos).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import State
from ..ops.checks import accumulator
from .attention import Attention, CrossAttention, FrameAttention, LocalAttention
from .embeddings import TimeEmbedding
from .layout import FULL_CONTEXT, ContextWindow, FrameLayout, Grid, sum_first
from .pom import PoM

MIXERS = ("product", "power", "attention", "local")
FRAME_MIXERS = ("product", "power", "attention", "attention+product", "attention+power")
INSIDE = "attention+"  # prefix of mixers with softmax inside each frame
DEFAULT_DEGREE = {"product": 2, "power": 3}
MOST_EARLIER = 2  # frames before its own that the local convolution of a video may see

Layer = TypeVar("Layer", bound=PoM)

# Mixers


class PolynomialMixer(PoM):
    """PoM over the tokens of an image; every token, registers included, sees all of them."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # (B, N, D) -> (B, N, D)
        return super().forward(x)  # pyright: ignore[reportReturnType] (no state is asked for)


class FrameMixer(PoM):
    """PoM over the frames of a video. Its cache is a `State` (B, G, C).

    With read="shared" it is what `ContextWindow.sum_earlier` takes; with read="split" the same of the past, and after
    it, if there is a sink, one more group for the first frames.

    Args:
        options: of `PoM`.
        sink: with read="split", number of first frames that never fade, and that a gate of their own reads.

    Raises:
        ValueError: as `PoM`, or a sink without split read.
    """

    def __init__(self, *args, sink: int = 0, **options):
        super().__init__(*args, **options)
        if sink and not self.split:
            raise ValueError(f"sink: expected 0 with read='shared', got {sink}; a sink has a gate, which read='split' gives")
        self.sink = sink
        if sink:
            self.sink_gate_proj = nn.Linear(self.dim, self.gate_proj.out_features)
            self.reset_past()

    def reset_past(self) -> None:
        """As `PoM.reset_past`; half of the sink is read too."""
        super().reset_past()
        if getattr(self, "sink", 0):
            for parameter in self.sink_gate_proj.parameters():
                nn.init.zeros_(parameter)

    def new_cache(
        self, batch: int, tokens: int, context_window: ContextWindow, dtype: torch.dtype, device: torch.device | str
    ) -> State:
        """The cache before the first frame. Its size does not depend on `tokens`, the number of earlier tokens."""
        groups = context_window.window - 1 if context_window.window else 1
        return self.new_past(batch, accumulator(dtype), device, groups + bool(self.sink))

    def forward(self, x: Tensor, layout: FrameLayout, cache: State | None = None) -> tuple[Tensor, State]:
        """Mix tokens (B, T, S, D); also returns the cache after these frames."""
        tokens = x.flatten(1, 2)  # (B, T * S, D)
        positions = None if self.rope is None else layout.coordinates
        if self.split or layout.teacher_forced or layout.context_window != FULL_CONTEXT:
            mixed, cache = self._mix_each_frame(tokens, x.shape[2], positions, layout, cache)
            return mixed.view_as(x), cache
        frames = x.shape[2] if layout.causal and x.shape[1] > 1 else None  # one frame alone is a whole sequence
        options = {"frames": frames, "positions": positions, "state": cache, "return_state": True}
        mixed: Tensor
        after: State
        mixed, after = super().forward(tokens, **options)  # pyright: ignore[reportAssignmentType]
        # Cloned: a view would keep the states of all frames in memory.
        return mixed.view_as(x), after if frames is None else after.clone()

    def _mix_each_frame(
        self, tokens: Tensor, size: int, positions: Tensor | None, layout: FrameLayout, cache: State | None
    ) -> tuple[Tensor, State]:
        """Sum every frame of `size` tokens alone, then let it see the earlier frames that the layout lets it see."""
        rotary, gate_rotary = self._rotaries(tokens, tokens, positions, None)
        offsets = torch.arange(0, tokens.shape[1] + 1, size, device=tokens.device)
        if not layout.causal:  # every frame sees all of them: they are one frame
            offsets, size = None, tokens.shape[1]
        own = self.state_of(tokens, cu_seqlens=offsets, rotary=rotary)  # (B, T, C)
        clean = own.map(layout.clean_frames)
        if cache is None:
            cache = self.new_cache(clean.total.shape[0], 0, layout.context_window, own.total.dtype, tokens.device)
        fade = self.fade_of(layout.clean_frames(tokens), offsets)
        past = cache.map(lambda t: t[:, :-1]) if self.sink else cache
        earlier, past = layout.context_window.sum_earlier(past, clean, fade)
        seen = [earlier]
        if self.sink:
            first = State(cache.total[:, -1:], cache.residual[:, -1:], cache.count[:, -1:, 0] if cache.fades else cache.count[:, -1:])
            seen_first, first = sum_first(first, clean, self.sink, size)
            seen.append(seen_first)
            past = State.cat([past, first.fading(past.count.shape[2]) if past.fades else first], dim=1)
        if layout.teacher_forced:
            seen = [State.cat([state, state], dim=0) for state in seen]
        if not self.split:
            return self.read(tokens, seen[0] + own, rotary=gate_rotary), past
        gates = [self.gate_proj, self.past_gate_proj, *([self.sink_gate_proj] if self.sink else [])]
        return self.read_each(tokens, [own, *seen], gates, rotary=gate_rotary), past


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
        self, batch: int, tokens: int, context_window: ContextWindow, dtype: torch.dtype, device: torch.device | str
    ) -> State:
        """See `FrameMixer.new_cache`."""
        return self.across.new_cache(batch, tokens, context_window, dtype, device)

    def forward(self, x: Tensor, layout: FrameLayout, cache: State | None = None) -> tuple[Tensor, State]:
        """Mix tokens (B, T, S, D); also returns the cache after these frames."""
        mixed, cache = self.across(x, layout, cache)
        return mixed + self.inside(x.flatten(0, 1), layout.grid).view_as(x), cache


def _make_polynomial(layer: type[Layer], kind: str, dim: int, n_heads: int, degree: int | None, **options: Any) -> Layer:
    """A PoM, or a subclass of it, with one gate per head in power form and a gate per channel in product form."""
    degree = DEFAULT_DEGREE[kind] if degree is None else degree
    return layer(dim, degree, form=kind, n_sel_heads=n_heads if kind == "power" else 1, **options)


def make_mixer(
    kind: str,
    dim: int,
    n_heads: int,
    *,
    degree: int | None = None,
    expand: int = 2,
    window: int = 8,
    shifted: bool = False,
) -> nn.Module:
    """The mixer of an image block, a module (x (B, N, D), grid) -> (B, N, D).

    Args:
        kind: "product" or "power" (PoM; the power form with one gate per head), "attention", "local".
        dim: width D of the tokens.
        n_heads: heads of attention, gates of the power form.
        degree: of PoM; None takes 2 for the product form and 3 for the power form.
        expand: of PoM, channels of the state per channel of the tokens.
        window: side of the windows of "local", in patches.
        shifted: whether these windows are moved by half their side.
    """
    if kind == "attention":
        return Attention(dim, n_heads)
    if kind == "local":
        return LocalAttention(dim, n_heads, window, shifted)
    return _make_polynomial(PolynomialMixer, kind, dim, n_heads, degree, expand=expand)


def make_frame_mixer(
    kind: str,
    dim: int,
    n_heads: int,
    *,
    degree: int | None = None,
    rope: str | None = None,
    **options: Any,
) -> FrameMixer | FrameAttention | HybridMixer:
    """The mixer of a video block, a module (x (B, T, S, D), layout, cache) -> ((B, T, S, D), cache).

    Args:
        kind: "product", "power", "attention", or "attention+power" or "attention+product" (`HybridMixer`).
        dim: width D of the tokens.
        n_heads: as in `make_mixer`.
        degree: as in `make_mixer`.
        rope: "3d" rotates the features of the power form by 3-D positions.
        options: `expand`, `read` and `fade` of `PoM`, and `sink` of `FrameMixer`.
    """
    if kind == "attention":
        return FrameAttention(dim, n_heads)
    form = kind.removeprefix(INSIDE)
    mixer = _make_polynomial(FrameMixer, form, dim, n_heads, degree, rope=rope if form == "power" else None, **options)
    return mixer if form == kind else HybridMixer(dim, n_heads, mixer)


def make_text_mixer(kind: str, dim: int, n_heads: int, *, degree: int | None = None, expand: int = 2) -> nn.Module:
    """The mixer by which video tokens read text, a module (x (B, M, D), text (B, L, D), weight=(B, L)) -> (B, M, D)."""
    if kind == "attention":
        return CrossAttention(dim, n_heads)
    return _make_polynomial(PoM, kind.removeprefix(INSIDE), dim, n_heads, degree, expand=expand)


# Local convolutions


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
            cache = self.new_cache(len(clean), x.shape[2], x.dtype, x.device)
            assert cache is not None
        padded = torch.cat([cache, clean], dim=1)  # (B, earlier + T, S, D)
        video = padded.unflatten(2, sizes).permute(0, 4, 1, 2, 3)  # (B, D, earlier + T, h, w), a view
        change = self.conv(video).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, S, D)
        if layout.teacher_forced:  # a noisy frame replaces the clean one under the kernel's last slice only
            noise = (x.chunk(2)[1] - clean).flatten(0, 1).unflatten(1, sizes).permute(0, 3, 1, 2)  # (B * T, D, h, w)
            noise = F.conv2d(noise, self.conv.weight[:, :, -1], padding=1, groups=noise.shape[1])
            change = torch.cat([change, change + noise.permute(0, 2, 3, 1).reshape(change.shape)])
        return x + change, padded[:, clean.shape[1] :]


# Blocks


class AdaLN(nn.Module):
    """LayerNorm whose scale and shift come from the condition: norm(x) * (1 + scale) + shift.

    Source: Peebles & Xie 2022, arXiv 2212.09748 (adaLN-Zero).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # (..., N, D), (..., 1 or N, D) -> (..., N, D)
        scale, shift = self.modulation(cond).chunk(2, dim=-1)  # 2 x (..., 1 or N, D)
        return torch.addcmul(shift, self.norm(x), 1 + scale)  # (..., N, D)


class ResidualGate(nn.Linear):
    """1 + g, with g linear in the condition. g starts at -1, so every residual branch starts closed."""

    def forward(self, cond: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return 1 + super().forward(cond)


class Block(nn.Module):
    """Local convolution, token mixer and feed-forward layers, all residual; the last two modulated and gated.

    The convolution comes before the mixer and has no gate. It learns from the first step, while the gates are still
    closed, and the mixer sums tokens that already know their neighbours.

    Args:
        dim: width D of the tokens.
        mixer: module (x, grid) -> x.
        ffw_expand: width of the feed-forward layers, in multiples of dim.
        local_conv: `LocalConv` or None.
    """

    def __init__(self, dim: int, mixer: nn.Module, ffw_expand: int = 4, local_conv: nn.Module | None = None):
        super().__init__()
        self.local_conv = local_conv
        self.mixer_norm, self.mixer_gate = AdaLN(dim), ResidualGate(dim, dim)
        self.mixer = mixer
        self.ffw_norm, self.ffw_gate = AdaLN(dim), ResidualGate(dim, dim)
        self.ffw = nn.Sequential(nn.Linear(dim, ffw_expand * dim), nn.GELU(), nn.Linear(ffw_expand * dim, dim))

    def forward(self, x: Tensor, cond: Tensor, grid: Grid) -> Tensor:  # (B, N, D), (B, 1 or N, D) -> (B, N, D)
        if self.local_conv is not None:
            x = self.local_conv(x, grid)  # (B, N, D)
        x = torch.addcmul(x, self.mixer_gate(cond), self.mixer(self.mixer_norm(x, cond), grid))  # (B, N, D)
        return torch.addcmul(x, self.ffw_gate(cond), self.ffw(self.ffw_norm(x, cond)))  # (B, N, D)


class VideoBlock(Block):
    """A block over frames that first reads the text, if there is any. The text is normalised and modulated too.

    Args:
        dim, ffw_expand: as in `Block`.
        mixer: module (x, layout, cache) -> (x, cache), see `make_frame_mixer`.
        local_conv: `FrameConv` or None.
        cross_mixer: module (x, text, weight=) -> x, see `make_text_mixer`; None for a model without text.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        ffw_expand: int = 4,
        local_conv: nn.Module | None = None,
        cross_mixer: nn.Module | None = None,
    ):
        super().__init__(dim, mixer, ffw_expand, local_conv)
        self.cross_mixer = cross_mixer
        if cross_mixer is not None:
            self.cross_norm, self.text_norm, self.cross_gate = AdaLN(dim), AdaLN(dim), ResidualGate(dim, dim)

    def _read_text(self, x: Tensor, cond: Tensor, text: Tensor, weight: Tensor | None) -> Tensor:
        """Every token reads the text (B, L, D), modulated by the condition (B, 1 or T, 1, D) of the token's frame."""
        assert self.cross_mixer is not None
        text = self.text_norm(text[:, None], cond)  # (B, 1 or T, L, D)
        groups = text.shape[1]
        frames = x.shape[1] // groups  # frames that share a condition
        queries = self.cross_norm(x, cond).reshape(-1, frames * x.shape[2], x.shape[3])  # (B * groups, frames * S, D)
        if weight is not None:
            weight = weight.repeat_interleave(groups, dim=0)  # (B * groups, L)
        return self.cross_mixer(queries, text.flatten(0, 1), weight=weight).view_as(x)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        layout: FrameLayout,
        text: Tensor | None = None,
        text_weight: Tensor | None = None,
        mixer_cache=None,
        conv_cache: Tensor | None = None,
    ):
        """Args:
            x: (B, T, S, D) tokens.
            cond: (B, 1 or T, 1, D) condition of every frame.
            layout: which frames a token sees.
            text, text_weight: (B, L, D) and (B, L).
            mixer_cache: the cache of the mixer after the frames before these; None at the start of a video.
            conv_cache: the last frames as the local convolution saw them (`FrameConv`); None at the start.

        Returns:
            (B, T, S, D), and both caches after these frames. Without earlier frames to see, the convolution has None.
        """
        if text is not None:
            x = torch.addcmul(x, self.cross_gate(cond), self._read_text(x, cond, text, text_weight))  # (B, T, S, D)
        if self.local_conv is not None:
            x, conv_cache = self.local_conv(x, layout, conv_cache)  # (B, T, S, D), (B, earlier, S, D)
        mixed, mixer_cache = self.mixer(self.mixer_norm(x, cond), layout, mixer_cache)  # (B, T, S, D)
        x = torch.addcmul(x, self.mixer_gate(cond), mixed)  # (B, T, S, D)
        x = torch.addcmul(x, self.ffw_gate(cond), self.ffw(self.ffw_norm(x, cond)))  # (B, T, S, D)
        return x, mixer_cache, conv_cache


def initialize(model: nn.Module) -> None:
    """Initialise all weights of a model in place, as davidpicard/HoMM does: every block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, HybridMixer):  # attention adds nothing
            nn.init.zeros_(module.inside.out_proj.weight)
        elif isinstance(module, PoM):
            module.reset_past()
        if isinstance(module, AdaLN):  # no modulation
            nn.init.zeros_(module.modulation.weight)
        elif isinstance(module, ResidualGate):  # closed
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, -1)
        elif isinstance(module, TimeEmbedding):
            for layer in module.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
