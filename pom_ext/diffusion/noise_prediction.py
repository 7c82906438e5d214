"""Noise prediction: denoising diffusion with 1000 noise levels (DDPM), sampled by DDIM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layers.embeddings import MAX_TIME
from .context import TRAINED_CONTEXTS
from .objectives import Objective, register_objective
from .timesteps import uniform_time


@register_objective("noise", "noise prediction")
class NoisePrediction(Objective):
    """Denoising diffusion with 1000 noise levels; the network predicts the noise in the image.

    Args:
        shift: see `resolution_shift`. It multiplies the noise-to-signal ratio of every level, so that a network must be
            sampled with the shift it was trained with.

    `scheduler` is the matching `diffusers.DDIMScheduler`.
    Source: Ho et al. 2020, arXiv 2006.11239 (linear betas); Song et al. 2021, arXiv 2010.02502 (sampling).
    """

    contexts = TRAINED_CONTEXTS

    def __init__(self, shift: float = 1.0) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        super().__init__(shift)
        signal = np.cumprod(1 - np.linspace(1e-4, 0.02, MAX_TIME))
        signal = signal / (signal + self.shift**2 * (1 - signal))
        betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
        self.scheduler: Any = DDIMScheduler(MAX_TIME, trained_betas=betas, timestep_spacing="trailing")

    def draw_time(self, batch: int, generator: torch.Generator) -> Tensor:
        """(batch,) integer times to train on."""
        return (MAX_TIME * uniform_time(batch, generator)).long().clamp(max=MAX_TIME - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t (B, ...) for data and noise (B, ...) at times (B,), truncated to integers."""
        return self.scheduler.add_noise(clean, noise, time.long())

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The noise (B, ...)."""
        return noise

    def estimate(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """See `Objective.estimate`: the noisy data without the predicted noise."""
        signal = self.scheduler.alphas_cumprod.to(noisy)[time.long()].view(-1, *[1] * (noisy.dim() - 1))
        return (noisy - (1 - signal).sqrt() * prediction) / signal.sqrt()

    def denoise(self, predict: Callable[..., Tensor], noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """See `Objective.denoise`; "euler" is deterministic DDIM."""
        self.scheduler.set_timesteps(steps, device=noise.device)
        x = noise
        for time in self.scheduler.timesteps:
            x = self.scheduler.step(predict(x, float(time)), time, x).prev_sample
        return x

    def for_resolution(self, pixels: int, trained_pixels: int) -> NoisePrediction:
        """The same at every resolution: a network knows only the noise levels it was trained with."""
        return self
