"""MeanFlow: the network predicts the mean velocity over a span of time, so one step goes from noise to data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import forward_mode
from ..layers.embeddings import MAX_TIME
from .flow_matching import FlowMatching
from .losses import draw_frames
from .network import Network
from .objectives import check_positive, register_objective
from .timesteps import flow_times

WEIGHT_FLOOR = 1e-3


@register_objective("meanflow", "MeanFlow")
class MeanFlow(FlowMatching):
    """The mean velocity over a span of time that ends at t: one step from noise to an image, or to a frame of a video.

    The network takes two times (`two_times=True`): t, and the span, t - r in the paper. For span 0 it predicts the
    velocity of flow matching. The losses: `meanflow_loss` and `meanflow_video_loss`.

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
    contexts = ("clean", "self")
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

    def velocity(
        self, model: Network, noisy: Tensor, time: Tensor, velocity: Tensor, labels: Tensor | None, **arguments: Any
    ) -> Tensor:
        """dx/dt of the path whose mean velocity is learned: that of the data, with guidance.

        With guidance w it is w v + (1 - w) u(x_t, t, 0) of no class.

        Args:
            model: the network in training.
            noisy: (B, ...), x_t.
            time: (B,), or (B, T') for the frames of videos.
            velocity: (B, ...), v = noise - data.
            labels: (B,) or (B, T'); those of no class keep v.
            arguments: further ones of the model.

        Returns:
            (B, ...), without gradient.

        Source: Geng et al. 2025, arXiv 2505.13447, equation 19.
        """
        if self.guidance == 1:
            return velocity
        assert labels is not None  # `supports`
        no_class = torch.full_like(labels, getattr(model, "module", model).config["n_classes"])
        with torch.no_grad():
            unguided = model(noisy, time, labels=no_class, **arguments).to(noisy.dtype)
        guided = torch.lerp(unguided, velocity, self.guidance)
        return torch.where(spread(labels == no_class, noisy), velocity, guided)

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
        """See `Objective.loss`: that of flow matching until VELOCITY_FIRST of the training, then of mean velocities."""
        if progress < self.VELOCITY_FIRST:
            return super().loss(model, clean, labels, generator, progress=progress, **video)
        if "length" in getattr(model, "module", model).config:
            return meanflow_video_loss(model, self, clean, labels, generator, progress=progress, **video)
        return meanflow_loss(model, self, clean, labels, generator)

    def supports(self, model: Network | None = None, **options: Any) -> list[str]:
        """See `Objective.supports`; without classes there is nothing to be guided by."""
        reasons = super().supports(model, **options)
        if self.guidance != 1 and model is not None and not model.config["n_classes"]:
            reasons.append(f"guidance: expected 1 for a model without classes, got {self.guidance}")
        return reasons

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
    model: Network, objective: MeanFlow, images: Tensor, labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Squared error of the mean velocity u over the span that ends at time t, from the identity that defines it:

        u(x_t, t, span) = v - span * d/dt u(x_t, t, span),   d/dt along the path: dx/dt = v, dt/dt = dspan/dt = 1

    The right side is computed by a derivative in forward mode, in one pass together with the left, and held constant.
    v is `MeanFlow.velocity`. Samples weigh 1 / (error + 0.001), so that those with a large derivative do not dominate
    the batch.

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
    noisy = objective.add_noise(images, noise, time)
    velocity = objective.velocity(model, noisy, time, objective.target(images, noise), labels)
    error = _identity_error(lambda x, time, span: model(x, time, labels, span), noisy, time, span, velocity)
    return weighted_mean(error.flatten(1).mean(1))  # (B,)


def meanflow_video_loss(
    model: Network,
    objective: MeanFlow,
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """The loss of `meanflow_loss` for the frames of videos, all in one pass, each with its own time, span and weight.

    The finished frames that a frame sees do not move along its path: they have no tangent, time 0 (or that of their
    context noise) and span 0.

    Args:
        model: a `VideoDiT` with two times, or a wrapper of one with the attribute `module`.
        objective: says how much guidance is trained in, and draws the times.
        video: (B, C, T, H, W) in [-1, 1].
        labels: (B,) or (B, T'); None for a model without.
        generator: of noise and times, on the device of the video.
        options: those of `video_loss`, with context "clean" or "self".

    Returns:
        the loss, a scalar.

    Raises:
        ValueError: another context, or no frame left to predict.
    """
    drawn = draw_frames(model, objective, objective.draw_times, video, labels, generator, **options)
    time, span = drawn.times
    velocity = objective.velocity(model, drawn.noisy, time, objective.target(video, drawn.noise), **drawn.arguments)

    def predict(x, time, span):
        return model(x, time, span=span, **drawn.arguments)

    error = _identity_error(predict, drawn.noisy, time, span, velocity)[:, :, drawn.given :]
    return weighted_mean(mean_of_frames(error, video.shape[2] // time.shape[1]))


def spread(marks: Tensor, data: Tensor) -> Tensor:
    """Marks (B,), or (B, T') of frames of tokens, in a shape that broadcasts with the data (B, C, ...)."""
    if marks.dim() == 2:
        marks = marks.repeat_interleave(data.shape[2] // marks.shape[1], dim=1)[:, None]  # (B, 1, T)
    return marks.view(*marks.shape, *[1] * (data.dim() - marks.dim()))


def _identity_error(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], noisy: Tensor, time: Tensor, span: Tensor, velocity: Tensor
) -> Tensor:
    """Squared differences (B, ...) of both sides of the identity in `meanflow_loss`; the right side has no gradient."""
    one = torch.full_like(time, MAX_TIME)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no derivative in forward mode
        mean, change = forward_mode.jvp(predict, (noisy, time, span), (velocity, one, one))
    target = velocity - spread(span / MAX_TIME, noisy) * change.to(noisy.dtype).detach()
    return (mean.to(noisy.dtype) - target).square()


def mean_of_frames(error: Tensor, unit: int) -> Tensor:
    """(B * T',) means over the frames of tokens, each of `unit` video frames, of errors (B, C, T, H, W)."""
    return error.unflatten(2, (-1, unit)).mean((1, 3, 4, 5)).flatten()


def weighted_mean(error: Tensor) -> Tensor:
    """The mean of errors (N,) with weights 1 / (error + 0.001)."""
    weight = 1 / (error.detach() + WEIGHT_FLOOR)
    return (weight * error).sum() / weight.sum()
