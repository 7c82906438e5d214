"""Mean squared errors of a network's prediction at random times: of images, and of the frames of videos.

`Objective.loss` chooses between them. An objective with a loss of its own has it in its file (`meanflow.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.embeddings import MAX_TIME
from .network import Network

if TYPE_CHECKING:
    from .objectives import Objective

CONTEXTS = ("clean", "shared")  # what a frame sees of the frames before it: finished frames, or noisy ones


def check_context(context: str, objective: Objective | None = None) -> None:
    """Raise ValueError for a context that is not in CONTEXTS, or that the objective does not have."""
    if context not in CONTEXTS:
        raise ValueError(f"context: expected one of {', '.join(CONTEXTS)}, got {context!r}")
    if objective is not None and context not in objective.contexts:
        raise ValueError(f"context: expected {' or '.join(objective.contexts)} with {objective.label}, got {context!r}")


def diffusion_loss(
    model: Network, objective: Objective, images: Tensor, labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the network's prediction for images, each at a random time.

    Args:
        model: called as model(noisy images, time, labels).
        objective: says what the network is trained to predict.
        images: (B, C, H, W) in [-1, 1].
        labels: (B,).
        generator: of noise and times, on the device of the images.

    Returns:
        the loss, a scalar.
    """
    time = objective.draw_time(len(images), generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    prediction = model(objective.add_noise(images, noise, time), time.to(images.dtype), labels)
    return F.mse_loss(prediction.to(images.dtype), objective.target(images, noise))


def video_loss(
    model: Network,
    objective: Objective,
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    *,
    context: str = "clean",
    context_noise: float = 0.0,
    given: int = 0,
    **text: Tensor,
) -> Tensor:
    """Mean squared error of a `VideoDiT`'s prediction at random times, all frames in one pass.

    Args:
        model: a `VideoDiT`, or a wrapper of one with the attribute `module`.
        objective: says what the network is trained to predict.
        video: (B, C, T, H, W) in [-1, 1].
        labels: (B,) or (B, T'), with T' = T / patch[0] frames of tokens; None for a model without.
        generator: of noise and times, on the device of the video.
        context: "clean": every frame has its own time, and sees the finished frames before it: the loss is the same as
            if the frames were predicted one by one (diffusion forcing, Chen et al. 2024, arXiv 2407.01392, with
            finished context). "shared": all frames have one time, and see each other's noise (arXiv 2411.12663).
        context_noise: up to 1; the finished frames of a video are shown with noise, at one time between 0 and this
            share of 1000. A model that has learned from noisy context corrects errors in its own frames
            (`VideoStream`).
        given: number of first frames of tokens that are shown without noise and do not count in the loss.
        text: arguments `text` and `text_weight` of the model.

    Returns:
        the loss, a scalar.

    Raises:
        ValueError: an unknown context, or no frame left to predict.
    """

    def draw_times(batch, generator):
        return (objective.draw_time(batch, generator),)

    options = {"context": context, "context_noise": context_noise, "given": given}
    drawn = draw_frames(model, objective, draw_times, video, generator, **options)
    prediction = model(drawn.noisy, *drawn.times, labels=labels, frame_causal=True, **drawn.finished, **text)
    target = objective.target(video, drawn.noise)
    return F.mse_loss(prediction.to(video.dtype)[:, :, drawn.given :], target[:, :, drawn.given :])


class NoisyFrames(NamedTuple):
    """Clips with noise for one step of training.

    Attributes:
        noisy: (B, C, T, H, W).
        times: what was drawn for every frame of tokens, each (B, T').
        noise: (B, C, T, H, W), of which `noisy` is made.
        finished: arguments `finished` and `finished_time` of the model.
        given: number of first video frames that do not count in the loss.
    """

    noisy: Tensor
    times: tuple[Tensor, ...]
    noise: Tensor
    finished: dict[str, Tensor]
    given: int


def draw_frames(
    model: Network,
    objective: Objective,
    draw_times: Callable[[int, torch.Generator], tuple[Tensor, ...]],
    video: Tensor,
    generator: torch.Generator,
    *,
    context: str = "clean",
    context_noise: float = 0.0,
    given: int = 0,
) -> NoisyFrames:
    """Draw times and noise for the frames of clips; the arguments are those of `video_loss`, which names its errors.

    Args:
        draw_times: draw_times(n, generator) gives tensors (n,), the first of them the times of the noise.
    """
    check_context(context, objective)
    unit = getattr(model, "module", model).config["patch"][0]
    batch, frames = len(video), video.shape[2] // unit
    if not 0 <= given < frames:
        raise ValueError(f"given: expected 0 to {frames - 1} of {frames} frames, got {given}")

    def fold(video):  # (B, C, T, H, W) -> (B * T', C, t, H, W)
        return video.unflatten(2, (frames, unit)).transpose(1, 2).flatten(0, 1)

    if context == "clean":  # evenly spread times come in order: shuffle them
        order = torch.randperm(batch * frames, generator=generator, device=video.device)
        times = tuple(drawn[order] for drawn in draw_times(batch * frames, generator))
    else:
        times = tuple(drawn.repeat_interleave(frames) for drawn in draw_times(batch, generator))
    noise = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    noisy = objective.add_noise(fold(video), fold(noise), times[0])
    noisy = noisy.unflatten(0, (batch, frames)).transpose(1, 2).flatten(2, 3)  # (B, C, T, H, W)
    times = tuple(drawn.to(video.dtype).view(batch, frames) for drawn in times)
    if given:
        noisy = torch.cat([video[:, :, : given * unit], noisy[:, :, given * unit :]], dim=2)
        times = tuple(torch.cat([torch.zeros_like(t[:, :given]), t[:, given:]], dim=1) for t in times)
    finished = {}
    if context == "clean":
        finished = {"finished": video}
        if context_noise:
            level = context_noise * MAX_TIME * torch.rand(batch, generator=generator, device=video.device)
            own_noise = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
            remembered = objective.add_noise(video, own_noise, level)
            finished = {"finished": remembered, "finished_time": level.to(video.dtype)}
    return NoisyFrames(noisy, times, noise, finished, given * unit)
