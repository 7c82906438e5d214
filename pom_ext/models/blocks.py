"""What the image and video transformers are built from: embeddings, mixers, the local convolution, the adaLN block.

A sequence is always (B, N, D) tokens. Whatever needs to know how they lie in the picture is given a `Grid`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import PoM
from ..ops.checks import under_autocast

MAX_TIME = 1000  # diffusion time runs over [0, 1000)
MIXERS = ("product", "power", "attention", "local")
DEFAULT_DEGREE = {"product": 2, "power": 3}


class Grid(NamedTuple):
    """How the tokens of a sequence lie: first `registers` extra tokens, then height x width patches, row by row."""

    height: int
    width: int
    registers: int = 0


# Patches and positions


def patchify(images, patch):
    """(B, C, H, W) -> (B, H/p * W/p, p * p * C): patches row by row, the channels of a pixel side by side."""
    blocks = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, H/p, p, W/p, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens, grid, patch):
    """The inverse of `patchify`: (B, H/p * W/p, p * p * C) -> (B, C, H, W)."""
    blocks = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (grid.height, grid.width))  # (B, H/p, W/p, p, p, C)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def full_precision(like):
    """float32, or float64 where `like` is: half precision is too coarse for angles and for interpolation."""
    return torch.promote_types(like.dtype, torch.float32)


def unit_interval(length, **options):
    """(length,) from 0 to 1. (torch.linspace would be compiled anew for every length.)"""
    return torch.arange(length, **options) / max(length - 1, 1)


def sincos_positions(grid, dim, like):
    """(1, height * width, dim) sine-cosine positions in the dtype and on the device of `like`.

    Coordinates run from 0 to 1 whatever the resolution, at odd multiples of half a turn
    (davidpicard/HoMM:src/model/network/imagediffusion.py, `sincos_embedding_2d`). dim is a multiple of 4.
    """
    options = {"device": like.device, "dtype": full_precision(like)}
    frequencies = math.pi * (2 * torch.arange(dim // 4, **options) + 1)  # (D/4,)

    def embed(length):
        angles = unit_interval(length, **options)[:, None] * frequencies  # (length, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (length, D/2)

    columns = embed(grid.width)[None, :].expand(grid.height, -1, -1)  # (h, w, D/2)
    rows = embed(grid.height)[:, None].expand(-1, grid.width, -1)  # (h, w, D/2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].to(like.dtype)  # (1, h * w, D)


class LearnedPositions(nn.Module):
    """One learned vector per patch of a side x side grid, resized (bicubic, antialiased) to any other grid."""

    def __init__(self, side, dim):
        super().__init__()
        self.table = nn.Parameter(torch.empty(side, side, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid):  # -> (1, height * width, D)
        table = self.table
        if table.shape[:2] != (grid.height, grid.width):
            image = table.to(full_precision(table)).permute(2, 0, 1)[None]  # (1, D, side, side)
            image = F.interpolate(image, size=(grid.height, grid.width), mode="bicubic", antialias=True)
            table = image[0].permute(1, 2, 0).to(table.dtype)  # (h, w, D)
        return table.flatten(0, 1)[None]


def time_frequencies(dim, like):
    """(dim / 2,) angular frequencies exp(-2 log(1000) k / dim), at least in float32, on the device of `like`."""
    exponent = torch.arange(dim // 2, device=like.device, dtype=full_precision(like)) / dim
    return torch.exp(-2 * math.log(MAX_TIME) * exponent)


class TimeEmbedding(nn.Module):
    """Diffusion time, of any shape (...), in [0, 1000), to (..., D). fastest: the highest of its frequencies."""

    def __init__(self, dim, fastest=1.0):
        super().__init__()
        self.dim, self.fastest = dim, fastest
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, time, like):
        """Computes in the dtype of `like`, at least in float32."""
        frequencies = self.fastest * time_frequencies(self.dim, like)  # (D/2,)
        angles = time.to(frequencies.dtype)[..., None] * frequencies  # (..., D/2)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype))  # (..., D)


# Checks that the models share


def check_least(config, least):
    """ValueError unless every argument named in `least` is an integer, and at least that."""
    for name, low in least.items():
        if not isinstance(config[name], int) or config[name] < low:
            raise ValueError(f"{name}: expected an integer of at least {low}, got {config[name]!r}")


def check_mixers(config, allowed):
    """The mixer of every layer; ValueError unless they are of the kinds allowed and the heads divide the width."""
    dim, n_heads, n_layers, mixer = config["dim"], config["n_heads"], config["n_layers"], config["mixer"]
    if dim % n_heads:
        raise ValueError(f"n_heads: expected a divisor of dim={dim}, got {n_heads}")
    mixers = [mixer] * n_layers if isinstance(mixer, str) else mixer
    for kind in mixers:
        if kind not in allowed:
            raise ValueError(f"mixer: expected one of {', '.join(allowed)}, got {kind!r}")
    if len(mixers) != n_layers:
        raise ValueError(f"mixer: expected one for each of n_layers={n_layers} layers, got {len(mixers)}")
    return mixers


def check_placed(weight, **inputs):
    """TypeError or ValueError unless every input is a tensor on the device of the model's weight. None is left out."""
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as the model, got {tensor.device}")


def check_dtype(weight, **inputs):
    """TypeError unless every input has the dtype of the model's weight, or autocast takes care of it."""
    for name, tensor in inputs.items():
        if tensor is not None and tensor.dtype != weight.dtype and not under_autocast(weight):
            raise TypeError(f"{name}: expected {weight.dtype} as the model, got {tensor.dtype}; use .to() on either")


def check_labels(labels, n_classes):
    """Integers in 0..n_classes. The range is checked on the CPU only: reading it back from a GPU would stop it."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
    readable = labels.device.type == "cpu" and type(labels) is torch.Tensor and not torch.compiler.is_compiling()
    if readable and labels.numel():
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high > n_classes:
            raise ValueError(f"labels: expected 0 to {n_classes} (no class), got values from {low} to {high}")


# Mixers: (B, N, D) tokens and their grid -> (B, N, D)


class PolynomialMixer(PoM):
    """PoM as the mixer of a block: every token, registers included, sees the whole sequence."""

    def forward(self, x, grid):
        return super().forward(x)


def attend(q, k, v, heads, mask=None):
    """Multi-head attention of q (B, M, D) over k, v (B, N, D). mask: True where a key is seen."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, ., D / heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # (B, M, D)


class Attention(nn.Module):
    """Multi-head self-attention as in facebookresearch/DiT: the yardstick, quadratic in tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
        return self.out_proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads))


class LocalAttention(Attention):
    """Attention inside windows of window x window patches: linear in tokens.

    Registers are keys of every window and attend to every token, so they carry what windows have in common.
    A shifted layer moves the windows by half their side; alternating the two lets neighbouring windows talk.
    A grid that the windows do not divide is padded, and the padding masked.
    """

    def __init__(self, dim, heads, window=8, shifted=False):
        super().__init__(dim, heads)
        self.window, self.shift = window, window // 2 if shifted else 0

    def _split(self, image):
        """(B, H, W, C) -> (B, windows, window * window, C), padded with zeros."""
        height, width = image.shape[1:3]
        bottom, right = (-(height + self.shift) % self.window, -(width + self.shift) % self.window)
        image = F.pad(image, (0, 0, self.shift, right, self.shift, bottom))
        image = image.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))  # (B, H/w, w, W/w, w, C)
        return image.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _join(self, windows, grid):
        """The inverse of `_split`: (B, windows, window * window, C) -> (B, H, W, C)."""
        image = windows.unflatten(1, (-(-(grid.height + self.shift) // self.window), -1))
        image = image.unflatten(3, (self.window, self.window)).transpose(2, 3)  # (B, H/w, w, W/w, w, C)
        image = image.flatten(3, 4).flatten(1, 2)
        return image[:, self.shift : self.shift + grid.height, self.shift : self.shift + grid.width]

    def forward(self, x, grid):
        registers, patches = self.qkv(x).split([grid.registers, grid.height * grid.width], dim=1)  # (B, ., 3D)
        windows = self._split(patches.unflatten(1, (grid.height, grid.width)))  # (B, windows, w * w, 3D)
        count = windows.shape[1]
        q = windows.flatten(0, 1).chunk(3, dim=-1)[0]  # (B * windows, w * w, D)
        seen = torch.cat([registers[:, None].expand(-1, count, -1, -1), windows], dim=2)  # (B, windows, R + w * w, 3D)
        _, k, v = seen.flatten(0, 1).chunk(3, dim=-1)  # (B * windows, R + w * w, D)
        mask = None
        if windows.shape[1] * windows.shape[2] != patches.shape[1]:  # there is padding
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


def polynomial(kind, dim, n_heads, degree=None, expand=2, *, rope=None, layer=PoM):
    """A `layer`, PoM or a subclass of it: "power" has one gate per head. degree: None takes `DEFAULT_DEGREE`."""
    degree = DEFAULT_DEGREE[kind] if degree is None else degree
    return layer(dim, degree, expand, form=kind, n_sel_heads=n_heads if kind == "power" else 1, rope=rope)


def make_mixer(kind, dim, n_heads, *, degree=None, expand=2, window=8, shifted=False):
    """One of `MIXERS` as a module (x (B, N, D), grid) -> (B, N, D).

    kind: "product" or "power" (PoM; the power form with one gate per head), "attention", "local" (`LocalAttention`).
    degree: None takes 2 for the product form and 3 for the power form.
    """
    if kind == "attention":
        return Attention(dim, n_heads)
    if kind == "local":
        return LocalAttention(dim, n_heads, window, shifted)
    return polynomial(kind, dim, n_heads, degree, expand, layer=PolynomialMixer)


class LocalConv(nn.Module):
    """x + depthwise 3x3 convolution of the patches; zero-initialised, registers pass by untouched.

    Tokens (B, N, D) seen as (B, D, H, W) are already in torch's channels-last format, so nothing is transposed.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x, grid):
        patches = x[:, grid.registers :]  # (B, N, D)
        image = patches.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)  # (B, D, h, w), a view
        patches = patches + self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, D)
        return torch.cat([x[:, : grid.registers], patches], dim=1) if grid.registers else patches


# The block


class AdaLN(nn.Module):
    """LayerNorm whose scale and shift come from the condition: norm(x) * (1 + scale) + shift."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x, cond):  # (..., N, D), (..., 1 or N, D)
        scale, shift = self.modulation(cond).chunk(2, dim=-1)  # 2 x (..., 1 or N, D)
        return torch.addcmul(shift, self.norm(x), 1 + scale)  # (..., N, D)


class Gate(nn.Linear):
    """1 + g, with g from the condition. g starts at -1, so that every branch starts closed."""

    def forward(self, cond):
        return 1 + super().forward(cond)


class Block(nn.Module):
    """Local convolution, token mixing and feed-forward, all residual; the last two modulated and gated by `cond`.

    The convolution stands in the residual stream before the mixer, outside its gate: it learns from the first step,
    while the gates are still closed, and what the mixer sums already knows its neighbourhood.
    """

    def __init__(self, dim, mixer, ffw_expand=4, local_conv=None):
        super().__init__()
        self.local_conv = local_conv
        self.mixer_norm, self.mixer_gate = AdaLN(dim), Gate(dim, dim)
        self.mixer = mixer
        self.ffw_norm, self.ffw_gate = AdaLN(dim), Gate(dim, dim)
        self.ffw = nn.Sequential(nn.Linear(dim, ffw_expand * dim), nn.GELU(), nn.Linear(ffw_expand * dim, dim))

    def forward(self, x, cond, grid):  # (B, N, D), (B, 1 or N, D)
        if self.local_conv is not None:
            x = self.local_conv(x, grid)  # (B, N, D)
        x = torch.addcmul(x, self.mixer_gate(cond), self.mixer(self.mixer_norm(x, cond), grid))  # (B, N, D)
        return torch.addcmul(x, self.ffw_gate(cond), self.ffw(self.ffw_norm(x, cond)))  # (B, N, D)


def initialize(model):
    """The authors' initialisation of a whole model: every block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, AdaLN):  # no modulation
            nn.init.zeros_(module.modulation.weight)
        elif isinstance(module, Gate):  # closed
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, -1)
        elif isinstance(module, TimeEmbedding):
            for layer in (module.mlp[0], module.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
