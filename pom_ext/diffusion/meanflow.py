"""MeanFlow: the network predicts the mean velocity over a span of time, so one step goes from noise to image."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import forward_mode
from ..layers.embeddings import MAX_TIME
from .flow_matching import FlowMatching
from .network import Network
from .objectives import check_positive, register_objective
from .timesteps import flow_times

WEIGHT_FLOOR = 1e-3


@register_objective("meanflow", "MeanFlow")
class MeanFlow(FlowMatching):
    """The mean velocity over a span of time that ends at t: one step from noise to image. The loss: `meanflow_loss`.

    The network takes two times (`ImageDiT(two_times=True)`): t, and the span, t - r in the paper. For span 0 it
    predicts the velocity of flow matching.

    Args:
        shift: of the times to train on, as for flow matching.
        guidance: trained into the network, which then needs one evaluation for a guided image. 1 is none.

    Raises:
        ValueError: a shift or guidance that is not positive.

    Source: Geng et al. 2025, arXiv 2505.13447.
    """

    solvers = ("euler",)
    default_steps = 1
    default_guidance = 1.0
    trained_guidance = 2.0
    for_video = False
    model_options = MappingProxyType({"two_times": True})

    INSTANT = 0.5  # share of samples trained with span 0
    VELOCITY_FIRST = 0.4  # share of the training with flow matching alone: first a velocity, then its mean

    def __init__(self, shift: float = 1.0, guidance: float = 1.0) -> None:
        super().__init__(shift)
        self.guidance = check_positive("guidance", guidance)

    def draw_times(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(batch,) times, and (batch,) spans before them that begin at or after time 0."""
        one, other = self.draw_time(batch, generator), self.draw_time(batch, generator)
        options = {"generator": generator, "device": generator.device}
        other = other[torch.randperm(batch, **options)]  # evenly spread times come in order
        other = torch.where(torch.rand(batch, **options) < self.INSTANT, one, other)
        return torch.maximum(one, other), (one - other).abs()

    def loss(
        self,
        model: Network,
        clean: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        *,
        progress: float = 1.0,
        **video: Any,
    ) -> Tensor:
        """See `Objective.loss`: that of flow matching until VELOCITY_FIRST of the training, then `meanflow_loss`."""
        if progress < self.VELOCITY_FIRST:
            return super().loss(model, clean, labels, generator)
        return meanflow_loss(model, self, clean, cast(Tensor, labels), generator)  # every `ImageDiT` has classes

    def denoise(self, predict: Callable[..., Tensor], noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """See `Objective.denoise`; predict(x, time, span) is the mean velocity over the span before time.

        Exact except for the network's error, even in a single step.
        Source: Geng et al. 2025, arXiv 2505.13447, equation 12.
        """
        x = noise
        for now, after in itertools.pairwise(flow_times(steps, self.shift)):
            x = x - (now - after) * predict(x, MAX_TIME * now, MAX_TIME * (now - after))
        return x


def meanflow_loss(
    model: Network, objective: MeanFlow, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the mean velocity u over the span that ends at time t, from the identity that defines it:

        u(x_t, t, span) = v - span * d/dt u(x_t, t, span),   d/dt along the path: dx/dt = v, dt/dt = dspan/dt = 1

    The right side is computed by a derivative in forward mode, in one pass together with the left, and held constant.
    With guidance w, v is w (noise - image) + (1 - w) u(x_t, t, 0) of no class. Samples weigh 1 / (error + 0.001), so
    that those with a large derivative do not dominate the batch.

    Args:
        model: an `ImageDiT` with two times.
        objective: says how much guidance is trained in, and draws the times.
        images: (B, C, H, W) in [-1, 1].
        labels: (B,).
        generator: of noise and times, on the device of the images.

    Returns:
        the loss, a scalar.

    Source: Geng et al. 2025, arXiv 2505.13447, equations 10, 19 and 22.
    """
    time, span = (t.to(images.dtype) for t in objective.draw_times(len(images), generator))
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    noisy, velocity = objective.add_noise(images, noise, time), objective.target(images, noise)
    if objective.guidance != 1:
        no_class = torch.full_like(labels, getattr(model, "module", model).config["n_classes"])
        with torch.no_grad():
            unguided = model(noisy, time, no_class).to(images.dtype)
        guided = torch.lerp(unguided, velocity, objective.guidance)
        velocity = torch.where((labels == no_class).view(-1, 1, 1, 1), velocity, guided)

    one = torch.full_like(time, MAX_TIME)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no derivative in forward mode
        mean, change = forward_mode.jvp(
            lambda x, time, span: model(x, time, labels, span), (noisy, time, span), (velocity, one, one)
        )
    share = (span / MAX_TIME).view(-1, 1, 1, 1)
    target = velocity - share * change.to(images.dtype).detach()
    error = (mean.to(images.dtype) - target).square().flatten(1).mean(1)  # (B,)
    weight = 1 / (error.detach() + WEIGHT_FLOOR)
    return (weight * error).sum() / weight.sum()
