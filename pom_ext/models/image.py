"""ImageDiT: class-conditional diffusion transformer on images or latents, with a choice of token mixers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.blocks import AdaLN, Block, initialize, make_mixer
from ..layers.embeddings import SMOOTH, LearnedPositions, TimeEmbedding, patchify, sincos_positions, unpatchify
from ..layers.layout import Grid
from ..layers.local_conv import LocalConv
from .checks import check_dtype, check_labels, check_placed
from .config import SIZES, ImageDiTConfig

CLAMP = 255.0  # the authors' bound on the residual stream of the variant with registers


class ImageDiT(nn.Module):
    """Diffusion transformer conditioned on time and class (davidpicard/HoMM, ClassConditionalDiH and -DiHpp).

    Args:
        in_channels: channels C of the images or latents.
        n_classes: number of classes; label `n_classes` means "no class" (label dropout, guidance).
        image_size: height and width of the training images. Any other multiple of `patch` works at run time.
        patch: side of the square patch that makes one token.
        dim: width of the tokens, a multiple of 4.
        n_layers: number of blocks.
        n_heads: heads of attention, and gates per token of the power form (1: a gate per channel).
        mixer: "product", "power", "attention" or "local", or a sequence with one of them per layer.
        degree, expand: of the polynomial mixers; degree None takes 2 for product, 3 for power.
        window: side of the windows of "local", in patches.
        ffw_expand: width of the feed-forward layers, in multiples of dim.
        local_conv: depthwise 3x3 convolution over the patches in every block (`LocalConv`).
        n_registers: 0 for sine-cosine positions; more for the authors' variant with that many extra tokens, learned
            positions and a condition per position.
        two_times: the model also takes a duration, `span`, and predicts the mean velocity over it
            (`diffusion.MeanFlow`). At initialisation it equals the model without.

    `config` holds these arguments as plain JSON values: `ImageDiT(**model.config)` builds the same model.

    Raises:
        ValueError: an argument is out of range, or two of them contradict each other.
    """

    @functools.wraps(ImageDiTConfig.__init__, assigned=())  # for help() and inspect.signature
    def __init__(self, *args: Any, **options: Any):
        super().__init__()
        config = ImageDiTConfig(*args, **options)
        self.config = config.to_dict()
        self.in_channels, self.n_classes = config.in_channels, config.n_classes
        self.image_size, self.patch = config.image_size, config.patch
        self.dim, self.n_registers = dim, n_registers = config.dim, config.n_registers

        self.patch_in = nn.Linear(config.patch**2 * config.in_channels, dim)
        self.time_embed = TimeEmbedding(dim, SMOOTH if config.two_times else 1.0)
        self.span_embed = TimeEmbedding(dim, SMOOTH) if config.two_times else None
        self.label_embed = nn.Embedding(config.n_classes + 1, dim)
        self.registers = None
        if n_registers:
            self.registers = nn.Parameter(torch.empty(n_registers, dim))
            self.register_cond = nn.Parameter(torch.empty(n_registers, dim))
            self.positions = LearnedPositions(config.image_size // config.patch, dim)
            self.position_cond = LearnedPositions(config.image_size // config.patch, dim)
        self.blocks = nn.ModuleList()
        mixer_options = {"degree": config.degree, "expand": config.expand, "window": config.window}
        kinds = config.mixers
        for layer, kind in enumerate(kinds):
            shifted = kinds[:layer].count("local") % 2 == 1  # every second windowed layer
            mixer = make_mixer(kind, dim, config.n_heads, shifted=shifted, **mixer_options)
            self.blocks.append(Block(dim, mixer, config.ffw_expand, LocalConv(dim) if config.local_conv else None))
        self.norm_out = AdaLN(dim)
        self.patch_out = nn.Linear(dim, config.patch**2 * config.in_channels)

        initialize(self)
        nn.init.zeros_(self.patch_out.weight)  # the untrained model predicts 0
        if self.span_embed is not None:
            nn.init.zeros_(self.span_embed.mlp[-1].get_parameter("weight"))
        if self.registers is not None:
            for parameter in (self.registers, self.register_cond):
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def reference_parameter(self) -> nn.Parameter:
        """A parameter that tells dtype and device. (The weight of a quantised layer is not a parameter.)"""
        return next(self.parameters())

    def forward(self, images: Tensor, time: Tensor, labels: Tensor, span: Tensor | None = None) -> Tensor:
        """Predict noise, velocity or whatever the model is trained for.

        Args:
            images: (B, C, H, W), noisy; H and W any multiples of `patch`.
            time: (B,) diffusion time in [0, 1000].
            labels: (B,) integers in 0..n_classes; n_classes means "no class". Their range is checked on the CPU only.
            span: (B,) duration before `time` over which to predict the mean velocity, 0 to `time`; for a model with
                two times. None is 0.

        Returns:
            (B, C, H, W).

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, device or range.
        """
        self._check_inputs(images, time, labels, span)
        weight = self.reference_parameter
        grid = Grid(images.shape[2] // self.patch, images.shape[3] // self.patch, self.n_registers)

        x = self.patch_in(patchify(images, self.patch))  # (B, N, D), N = height * width
        cond = self.time_embed(time, weight) + self.label_embed(labels)  # (B, D)
        if self.span_embed is not None:
            cond = cond + self.span_embed(torch.zeros_like(time) if span is None else span, weight)  # (B, D)
        cond = cond[:, None]  # (B, 1, D)
        if self.registers is None:
            x = x + sincos_positions(grid, self.dim, like=weight)  # (B, N, D)
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

    def _check_inputs(self, images: Tensor, time: Tensor, labels: Tensor, span: Tensor | None) -> None:
        weight = self.reference_parameter
        check_placed(weight, images=images, time=time, labels=labels, span=span)
        if span is not None and self.span_embed is None:
            raise ValueError("span: expected None, for this model has one time; build it with two_times=True")
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images: expected shape (B, {self.in_channels}, H, W), got {tuple(images.shape)}")
        check_dtype(weight, images=images)
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"images: expected height and width to be multiples of the patch size {self.patch}, "
                f"got {height} x {width}; pad or resize them"
            )
        for name, tensor in (("time", time), ("labels", labels), ("span", span)):
            if tensor is not None and tensor.shape != images.shape[:1]:
                raise ValueError(f"{name}: expected shape ({len(images)},), one per image, got {tuple(tensor.shape)}")
        check_labels(labels, self.n_classes)


IMAGE_DITS = {f"{name}/{patch}": {**size, "patch": patch} for name, size in SIZES.items() for patch in (2, 4, 8)}


def image_dit(name: str, **options: Any) -> ImageDiT:
    """The `ImageDiT` of a standard size, "S/2" to "XL/8": size / patch, as in facebookresearch/DiT, `DiT_models`.

    With the defaults, "power" and "attention" have equal parameter counts. The authors' DiH, with mixer="product",
    narrows the feed-forward layers instead (ffw_expand 3 for S and B, 2 for L and XL) and has no local convolution.

    Args:
        name: one of `IMAGE_DITS`.
        options: arguments of `ImageDiT`; they override those of the size.

    Raises:
        ValueError: an unknown name, or arguments that `ImageDiT` refuses.
    """
    if name not in IMAGE_DITS:
        raise ValueError(f"name: expected one of {', '.join(IMAGE_DITS)}, got {name!r}")
    return ImageDiT(**{**IMAGE_DITS[name], **options})
