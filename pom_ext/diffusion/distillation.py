"""Distillation: a video model of many solver steps teaches one of one or two (`pom_ext.training.distill`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers.embeddings import MAX_TIME
from .guidance import apply_guidance, num_copies
from .losses import draw_frames
from .meanflow import MeanFlow, mean_of_frames, spread, weighted_mean
from .network import Network
from .timesteps import flow_times, shift_time, uniform_time


class Distillation(MeanFlow):
    """The mean velocity along the paths of a teacher, which predicts velocities and is guided.

    Mean velocities over spans that follow one another add up: with the teacher's velocity v at t, for a step d,

        span u(x, t, span) = d v + (span - d) u(x - d v, t - d, span - d)

    The right side is held constant. It is the identity of `meanflow_loss` with a difference in place of the derivative.
    A teacher is not smooth in time, which it sees in frequencies up to 1: over a step its derivative says little.

    Args:
        teacher: the `VideoDiT` that was trained with flow matching, and clean or self context.
        shift: of the times, as for flow matching.
        guidance: of the teacher, trained into the network.
        draw_steps: solver steps that the network will draw with. Spans do not cross the times that these visit.

    Raises:
        ValueError: draw_steps below 1, or a shift or guidance that is not positive.

    Source: Song et al. 2023, arXiv 2303.01469, algorithm 2, for mean velocities; Frans et al. 2024, arXiv 2410.12557.
    """

    STEP = MAX_TIME / 32  # the network learns to draw what the teacher draws in steps of this length
    WHOLE = 0.5  # share of the spans that begin where a solver step ends

    def __init__(self, teacher: nn.Module, shift: float = 1.0, guidance: float = 1.0, draw_steps: int = 1) -> None:
        super().__init__(shift, guidance)
        if draw_steps < 1:
            raise ValueError(f"draw_steps: expected at least 1, got {draw_steps}")
        self.teacher, self.draw_steps = teacher, draw_steps

    def draw_time(self, batch: int, generator: torch.Generator) -> Tensor:
        """(batch,) times in (0, 1000], evenly spread before the shift: a drawing begins at 1000."""
        return MAX_TIME * shift_time(1 - uniform_time(batch, generator), self.shift)

    def draw_times(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(batch,) times, and (batch,) spans before them, each inside one solver step."""
        time = self.draw_time(batch, generator)
        ends = MAX_TIME * torch.tensor(flow_times(self.draw_steps, self.shift)[:0:-1], device=time.device)
        end = ends[(torch.searchsorted(ends, time) - 1).clamp_min(0)]  # the last of these times before each
        whole, share = torch.rand(2, batch, generator=generator, device=time.device)
        return time, (time - end) * torch.where(whole < self.WHOLE, 1, share)

    def loss(
        self,
        model: Network,
        clean: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        **options: Any,
    ) -> Tensor:
        """Squared error of the mean velocity, for clips (B, C, T, H, W); arguments as of `meanflow_video_loss`."""
        drawn = draw_frames(model, self, self.draw_times, clean, labels, generator, **options)
        noisy, (time, span), arguments = drawn.noisy, drawn.times, drawn.arguments
        step = span.clamp_max(self.STEP)
        with torch.no_grad():
            velocity = self.teach(noisy, time, **arguments).to(clean.dtype)
            before = noisy - spread(step / MAX_TIME, noisy) * velocity
            left = span - step
            mean = model(before, time - step, span=left, **arguments).to(clean.dtype)
            target = torch.lerp(velocity, mean, spread(left / span.clamp_min(1e-9), noisy))
        error = (model(noisy, time, span=span, **arguments).to(clean.dtype) - target).square()
        return weighted_mean(mean_of_frames(error[:, :, drawn.given :], clean.shape[2] // time.shape[1]))

    def teach(self, noisy: Tensor, time: Tensor, labels: Tensor | None, **arguments: Any) -> Tensor:
        """The guided velocity (B, C, T, H, W) of the teacher; every finished frame is guided too, as in a stream."""
        self.teacher.to(noisy.device)  # where the training put the student
        predictions = [self.teacher(noisy, time, labels=labels, **arguments)]
        if num_copies(self.guidance) == 2:
            assert labels is not None  # `supports`
            no_class = torch.full_like(labels, cast(Network, self.teacher).config["n_classes"])
            predictions.append(self.teacher(noisy, time, labels=no_class, **arguments))
        return apply_guidance(torch.cat(predictions), self.guidance)
