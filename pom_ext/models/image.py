"""ImageDiT: class-conditional diffusion transformer on images or latents, with a token mixer of your choice."""

import torch
import torch.nn.functional as F
from torch import nn

from . import blocks
from .blocks import AdaLN, Block, Grid, LearnedPositions, LocalConv, TimeEmbedding, make_mixer, patchify, unpatchify

CLAMP = 255.0  # the authors' bound on the residual stream of the variant with registers
SMOOTH = 0.02  # highest frequency of time where the model is differentiated by it: 20 radians from image to noise


def _check_config(config):
    """Raise ValueError for arguments that make no model."""
    least = {"in_channels": 1, "n_classes": 0, "image_size": 1, "patch": 1, "dim": 4, "n_layers": 1, "n_heads": 1,
             "window": 1, "ffw_expand": 1, "n_registers": 0}  # fmt: skip
    blocks.check_least(config, least)
    if config["dim"] % 4:
        raise ValueError(f"dim: expected a multiple of 4 (sine and cosine of two axes), got {config['dim']}")
    if config["image_size"] % config["patch"]:
        raise ValueError(f"image_size: expected a multiple of patch={config['patch']}, got {config['image_size']}")
    blocks.check_mixers(config, blocks.MIXERS)


class ImageDiT(nn.Module):
    """Diffusion transformer conditioned on time and class (davidpicard/HoMM, ClassConditionalDiH and -DiHpp).

    Args:
        in_channels: channels C of the images or latents.
        n_classes: number of classes; label `n_classes` means "no class" (label dropout, guidance).
        image_size: height and width that the model is trained at. Any other multiple of `patch` works at run time.
        patch: side of the square patch that makes one token.
        dim: width of the tokens, a multiple of 4.
        n_layers: number of blocks.
        n_heads: heads of attention, and gates per token of the power form (1: a gate per channel).
        mixer: "product", "power", "attention" or "local", or a sequence with one of them per layer.
        degree, expand: of the polynomial mixers; degree None takes 2 for product, 3 for power.
        window: side of the windows of "local", in patches.
        ffw_expand: width of the feed-forward layers, in multiples of dim.
        local_conv: depthwise 3x3 convolution over the patches in every block (`blocks.LocalConv`).
        n_registers: 0 for sine-cosine positions; more for the authors' variant with that many extra tokens, learned
            positions and a condition per position.
        two_times: the model is told a span of time too, and answers for the way through it (`diffusion.MeanFlow`). It
            starts as the model without.

    `config` holds these arguments as plain JSON values: `ImageDiT(**model.config)` builds the same model.

    Raises:
        ValueError: an argument outside what is said above.
    """

    def __init__(self, in_channels=4, n_classes=1000, image_size=32, *, patch=2, dim=384, n_layers=12, n_heads=6,
                 mixer="power", degree=None, expand=2, window=8, ffw_expand=4, local_conv=True, n_registers=0,
                 two_times=False):  # fmt: skip
        super().__init__()
        self.config = {
            "in_channels": in_channels, "n_classes": n_classes, "image_size": image_size, "patch": patch, "dim": dim,
            "n_layers": n_layers, "n_heads": n_heads, "mixer": mixer if isinstance(mixer, str) else list(mixer),
            "degree": degree, "expand": expand, "window": window, "ffw_expand": ffw_expand, "local_conv": local_conv,
            "n_registers": n_registers, "two_times": two_times,
        }  # fmt: skip
        _check_config(self.config)
        mixers = [mixer] * n_layers if isinstance(mixer, str) else list(mixer)
        self.in_channels, self.n_classes, self.image_size, self.patch = in_channels, n_classes, image_size, patch
        self.dim, self.n_registers = dim, n_registers

        self.patch_in = nn.Linear(patch * patch * in_channels, dim)
        self.time_embed = TimeEmbedding(dim, SMOOTH if two_times else 1.0)
        self.span_embed = TimeEmbedding(dim, SMOOTH) if two_times else None
        self.label_embed = nn.Embedding(n_classes + 1, dim)
        self.registers = None
        if n_registers:
            self.registers = nn.Parameter(torch.empty(n_registers, dim))
            self.register_cond = nn.Parameter(torch.empty(n_registers, dim))
            self.positions = LearnedPositions(image_size // patch, dim)
            self.position_cond = LearnedPositions(image_size // patch, dim)
        self.blocks = nn.ModuleList()
        for layer, kind in enumerate(mixers):
            shifted = mixers[:layer].count("local") % 2 == 1  # every other windowed layer
            module = make_mixer(kind, dim, n_heads, degree=degree, expand=expand, window=window, shifted=shifted)
            self.blocks.append(Block(dim, module, ffw_expand, LocalConv(dim) if local_conv else None))
        self.norm_out = AdaLN(dim)
        self.patch_out = nn.Linear(dim, patch * patch * in_channels)

        blocks.initialize(self)
        nn.init.zeros_(self.patch_out.weight)  # the untrained model predicts 0
        if two_times:
            nn.init.zeros_(self.span_embed.mlp[-1].weight)
        for parameter in (self.registers, self.register_cond) if n_registers else ():
            nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def like(self):
        """A parameter, for its dtype and device. (Of a quantised layer the weight is none.)"""
        return next(self.parameters())

    def forward(self, images, time, labels, span=None):
        """Predict noise, velocity or whatever the model is trained for.

        Args:
            images: (B, C, H, W), noisy; H and W any multiples of `patch`.
            time: (B,) diffusion time in [0, 1000).
            labels: (B,) integers in 0..n_classes; n_classes means "no class". Their values are checked on the CPU
                only: reading them back from a GPU would stop it.
            span: (B,) of a model with two times: how far back from `time` to answer for, at most `time`. None is 0.

        Returns:
            (B, C, H, W).

        Raises:
            TypeError, ValueError: an argument of another type, shape, device or range.
        """
        self._check_inputs(images, time, labels, span)
        height, width = images.shape[2] // self.patch, images.shape[3] // self.patch
        grid = Grid(height, width, self.n_registers)

        x = self.patch_in(patchify(images, self.patch))  # (B, N, D), N = height * width
        cond = self.time_embed(time, self.like) + self.label_embed(labels)  # (B, D)
        if self.span_embed is not None:
            cond = cond + self.span_embed(torch.zeros_like(time) if span is None else span, self.like)  # (B, D)
        cond = cond[:, None]  # (B, 1, D)
        if self.registers is None:
            x = x + blocks.sincos_positions(grid, self.dim, like=self.like)  # (B, N, D)
        else:
            x = x + self.positions(grid)  # (B, N, D)
            x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], dim=1)  # (B, R + N, D)
            cond = cond + torch.cat([self.register_cond[None], self.position_cond(grid)], dim=1)  # (B, R + N, D)
        cond = F.silu(cond)  # (B, 1 or R + N, D)

        for block in self.blocks:
            x = block(x, cond, grid)  # (B, R + N, D)
            if self.registers is not None:
                x = x.clamp(-CLAMP, CLAMP)  # (B, R + N, D)

        x = self.norm_out(x, cond)[:, self.n_registers :]  # (B, N, D)
        return unpatchify(self.patch_out(x), grid, self.patch)  # (B, C, H, W)

    def _check_inputs(self, images, time, labels, span):
        weight = self.like
        blocks.check_placed(weight, images=images, time=time, labels=labels, span=span)
        if span is not None and self.span_embed is None:
            raise ValueError("span: expected None, for this model has one time; build it with two_times=True")
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images: expected shape (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        blocks.check_dtype(weight, images=images)
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"images: expected height and width to be multiples of the patch size {self.patch}, "
                f"got {height} x {width}; pad or resize them"
            )
        for name, tensor in (("time", time), ("labels", labels), ("span", span)):
            if tensor is not None and tensor.shape != images.shape[:1]:
                raise ValueError(f"{name}: expected shape ({len(images)},), one per image, got {tuple(tensor.shape)}")
        blocks.check_labels(labels, self.n_classes)


SIZES = {
    "S": {"dim": 384, "n_layers": 12, "n_heads": 6},
    "B": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "L": {"dim": 1024, "n_layers": 24, "n_heads": 16},
    "XL": {"dim": 1152, "n_layers": 28, "n_heads": 16},
}
IMAGE_DITS = {f"{name}/{patch}": {**size, "patch": patch} for name, size in SIZES.items() for patch in (2, 4, 8)}


def image_dit(name, **options):
    """The `ImageDiT` of a standard size, "S/2" to "XL/8" (facebookresearch/DiT `DiT_models`: size / patch).

    `options` are arguments of ImageDiT and go before those of the size. The defaults make models of equal parameter
    count with "power" and "attention"; the authors' DiH, with mixer="product", narrows the feed-forward layers instead
    (ffw_expand 3 for S and B, 2 for L and XL) and has no local convolution.
    """
    if name not in IMAGE_DITS:
        raise ValueError(f"name: expected one of {', '.join(IMAGE_DITS)}, got {name!r}")
    return ImageDiT(**{**IMAGE_DITS[name], **options})
