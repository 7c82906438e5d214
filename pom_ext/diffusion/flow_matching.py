"""Flow matching: a straight path from data to noise, and the network predicts the velocity along it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layers.embeddings import MAX_TIME
from .context import TRAINED_CONTEXTS
from .objectives import Objective, register_objective
from .solvers import integrate
from .timesteps import flow_times, logit_normal_time, shift_time


@register_objective("flow", "flow matching")
class FlowMatching(Objective):
    """Straight path from data to noise, x_t = (1 - t) x + t noise; the network predicts its velocity, noise - x.

    Args:
        shift: see `resolution_shift`. The larger it is, the more noisy times are drawn in training and visited in
            sampling.

    Source: Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003; logit-normal times: Esser et al.
    2024, arXiv 2403.03206, section 3.1.
    """

    solvers = ("euler", "heun")
    contexts = TRAINED_CONTEXTS

    def draw_time(self, batch: int, generator: torch.Generator) -> Tensor:
        """(batch,) times to train on, logit-normal before the shift."""
        return MAX_TIME * shift_time(logit_normal_time(batch, generator), self.shift)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t (B, ...) for data and noise (B, ...) at times (B,)."""
        t = (time / MAX_TIME).to(clean.dtype).view(-1, *[1] * (clean.dim() - 1))
        return (1 - t) * clean + t * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The velocity (B, ...)."""
        return noise - clean

    def estimate(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """See `Objective.estimate`: where the velocity leads."""
        t = (time / MAX_TIME).to(noisy.dtype).view(-1, *[1] * (noisy.dim() - 1))
        return noisy - t * prediction

    def denoise(self, predict: Callable[..., Tensor], noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """See `Objective.denoise`: follows the velocity from noise to data."""
        return integrate(lambda x, t: predict(x, MAX_TIME * t), noise, flow_times(steps, self.shift), solver)
