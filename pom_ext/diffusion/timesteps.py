"""Diffusion times: how they are drawn in training, visited in sampling, and shifted towards noise.

The network's time runs from 0, the data, to MAX_TIME, noise. Functions that name no unit use t = time / MAX_TIME.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE_PIXELS = 32 * 32  # at this size noise levels are spread evenly; larger images need more noise to be hidden as well


def resolution_shift(pixels: int, base_pixels: int = BASE_PIXELS) -> float:
    """Factor by which the noise-to-signal ratio must rise to hide as much of an image of `pixels` as of `base_pixels`.

    Neighbouring pixels are alike, so noise averages out by the square root of their number.

    Args:
        pixels: positions the network receives: pixels, or latents for a model of latents.
        base_pixels: positions of the image to compare with.

    Source: Esser et al. 2024 (Stable Diffusion 3), arXiv 2403.03206, equation 23.
    """
    return math.sqrt(pixels / base_pixels)


def shift_time(time, shift: float):
    """t' = s t / (1 + (s - 1) t) for t in [0, 1], a number or a tensor: multiplies the noise-to-signal ratio by s."""
    return shift * time / (1 + (shift - 1) * time)


def uniform_time(batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) times in [0, 1), one from each of `batch` equal intervals: evenly spread in every batch, and in order."""
    offset = torch.rand(batch, generator=generator, device=generator.device)
    return (torch.arange(batch, device=generator.device) + offset) / batch


def logit_normal_time(batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) times in [0, 1], mostly in the middle, where data and noise are both strong; in order.

    Source: Esser et al. 2024, arXiv 2403.03206, section 3.1.
    """
    return torch.special.ndtri(uniform_time(batch, generator)).sigmoid()


def flow_times(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 times 1 = t_0 > ... > t_steps = 0 that a sampler visits, shifted towards noise."""
    return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]
