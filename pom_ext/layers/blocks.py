"""Blocks of the image and video transformers: polynomial mixers, local convolutions, adaptive LayerNorm, gates.

Tokens are (B, N, D) for images and (B, T, S, D) for videos, with T frames of S = height * width patches. Modules that
need to know where the tokens lie take a `Grid` (images) or a `FrameLayout` (videos).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attention import Attention, CrossAttention, FrameAttention, LocalAttention
from .embeddings import TimeEmbedding
from .frame_mixer import FrameMixer, HybridMixer
from .layout import FrameLayout, Grid
from .pom import PoM

MIXERS = ("product", "power", "attention", "local")
FRAME_MIXERS = ("product", "power", "attention", "attention+product", "attention+power")
INSIDE = "attention+"  # prefix of mixers with softmax inside each frame
DEFAULT_DEGREE = {"product": 2, "power": 3}

Layer = TypeVar("Layer", bound=PoM)

# Mixers


class PolynomialMixer(PoM):
    """PoM over the tokens of an image; every token, registers included, sees all of them."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # (B, N, D) -> (B, N, D)
        return super().forward(x)  # pyright: ignore[reportReturnType] (no state is asked for)


def _make_polynomial(
    layer: type[Layer], kind: str, dim: int, n_heads: int, degree: int | None, **options: Any
) -> Layer:
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
        options: `expand`, `read` and `fade` of `PoM`, `sink` and `space_groups` of `FrameMixer`.
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
