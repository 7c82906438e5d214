"""Mean squared errors of a network's prediction at random times: of images, and of the frames of videos.

`Objective.loss` chooses between them. An objective with a loss of its own has it in its file (`meanflow.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        given: number of first frames of tokens that are shown without noise and do not count in the loss.
        progress: completed share of the training, 0 to 1, on which the share of own frames depends.
        text: arguments `text` and `text_weight` of the model.

    Returns:
        the loss, a scalar.

    Raises:
        ValueError: an unknown context, or no frame left to predict.
    """
    check_context(context, TRAINED_CONTEXTS)
    unit = getattr(model, "module", model).config["patch"][0]
    batch, frames = len(video), video.shape[2] // unit
    if not 0 <= given < frames:
        raise ValueError(f"given: expected 0 to {frames - 1} of {frames} frames, got {given}")

    if context == "shared":
        time = objective.draw_time(batch, generator).repeat_interleave(frames)
    else:  # evenly spread times come in order: shuffle them
        order = torch.randperm(batch * frames, generator=generator, device=video.device)
        time = objective.draw_time(batch * frames, generator)[order]
    time = time.view(batch, frames)
    noise = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    noisy, time = add_noise(objective, video, noise, time), time.to(video.dtype)
    if given:
        noisy = torch.cat([video[:, :, : given * unit], noisy[:, :, given * unit :]], dim=2)
        time = torch.cat([torch.zeros_like(time[:, :given]), time[:, given:]], dim=1)
    finished = {}
    if context != "shared":
        options: dict[str, Any] = {"own": context == "self", "context_noise": context_noise, "progress": progress}
        finished = finished_frames(model, objective, video, {"labels": labels, **text}, generator, **options)
    prediction = model(noisy, time, labels=labels, frame_causal=True, **finished, **text).to(video.dtype)
    return F.mse_loss(prediction[:, :, given * unit :], objective.target(video, noise)[:, :, given * unit :])
