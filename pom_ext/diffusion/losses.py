"""Mean squared errors of a network's prediction at random times: of images, and of the frames of videos.

`Objective.loss` chooses between them. An objective with a loss of its own has it in its file (`meanflow.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import TRAINED_CONTEXTS, add_noise, check_context, finished_frames
from .network import Network

if TYPE_CHECKING:
    from .objectives import Objective


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
    other_label: float = 0.0,
    given: int = 0,
    progress: float = 1.0,
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
            finished context). "self": the same, but the finished frames are partly the model's own
            (`context.finished_frames`). "shared": all frames have one time, and see each other's noise (arXiv
            2411.12663).
        context_noise: up to 1; every finished frame is shown with noise, of a time between 0 and this share of 1000. A
            model that has learned from noisy context corrects errors in its own frames (`VideoStream`).
        other_label: with context="self", share of the model's own clips that are drawn for another class.
        given: number of first frames of tokens that are shown without noise and do not count in the loss.
        progress: completed share of the training, 0 to 1, on which the share of own frames depends.
        text: arguments `text` and `text_weight` of the model.

    Returns:
        the loss, a scalar.

    Raises:
        ValueError: an unknown context, or no frame left to predict.
    """

    def draw_times(batch, generator):
        return (objective.draw_time(batch, generator),)

    options: dict[str, Any] = {"context": context, "context_noise": context_noise, "other_label": other_label}
    options |= {"given": given, "progress": progress, **text}
    drawn = draw_frames(model, objective, draw_times, video, labels, generator, **options)
    prediction = model(drawn.noisy, *drawn.times, **drawn.arguments)
    target = objective.target(video, drawn.noise)
    return F.mse_loss(prediction.to(video.dtype)[:, :, drawn.given :], target[:, :, drawn.given :])


class NoisyFrames(NamedTuple):
    """Clips with noise for one step of training.

    Attributes:
        noisy: (B, C, T, H, W).
        times: what was drawn for every frame of tokens, each (B, T').
        noise: (B, C, T, H, W), of which `noisy` is made.
        arguments: further ones of the model: finished frames and conditions.
        given: number of first video frames that do not count in the loss.
    """

    noisy: Tensor
    times: tuple[Tensor, ...]
    noise: Tensor
    arguments: dict[str, Any]
    given: int


def draw_frames(
    model: Network,
    objective: Objective,
    draw_times: Callable[[int, torch.Generator], tuple[Tensor, ...]],
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    *,
    context: str = "clean",
    context_noise: float = 0.0,
    other_label: float = 0.0,
    given: int = 0,
    progress: float = 1.0,
    **text: Tensor,
) -> NoisyFrames:
    """Draw times, noise and finished frames for clips.

    `draw_times(n, generator)` gives tensors (n,), the first of them the times of the noise. The other arguments and the
    errors are those of `video_loss`.
    """
    check_context(context, TRAINED_CONTEXTS, objective)
    unit = getattr(model, "module", model).config["patch"][0]
    batch, frames = len(video), video.shape[2] // unit
    if not 0 <= given < frames:
        raise ValueError(f"given: expected 0 to {frames - 1} of {frames} frames, got {given}")

    if context == "shared":
        times = tuple(drawn.repeat_interleave(frames) for drawn in draw_times(batch, generator))
    else:  # evenly spread times come in order: shuffle them
        order = torch.randperm(batch * frames, generator=generator, device=video.device)
        times = tuple(drawn[order] for drawn in draw_times(batch * frames, generator))
    times = tuple(drawn.view(batch, frames) for drawn in times)
    noise = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    noisy, times = add_noise(objective, video, noise, times[0]), tuple(drawn.to(video.dtype) for drawn in times)
    if given:
        noisy = torch.cat([video[:, :, : given * unit], noisy[:, :, given * unit :]], dim=2)
        times = tuple(torch.cat([torch.zeros_like(t[:, :given]), t[:, given:]], dim=1) for t in times)
    arguments: dict[str, Any] = {"labels": labels, **text}
    if context != "shared":
        options: dict[str, Any] = {"context_noise": context_noise, "other_label": other_label}
        options |= {"own": context == "self", "progress": progress}
        arguments |= finished_frames(model, objective, video, arguments, generator, **options)
    return NoisyFrames(noisy, times, noise, arguments | {"frame_causal": True}, given * unit)
