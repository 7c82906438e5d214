"""The finished frames behind which the frames of a video are trained: true ones, with noise, or the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers.embeddings import MAX_TIME
from .network import Network

if TYPE_CHECKING:
    from .objectives import Objective

CONTEXTS = ("clean", "shared")  # what a frame of a stream sees of the frames before it: finished frames, or noisy ones
TRAINED_CONTEXTS = (*CONTEXTS, "self")
WITHOUT_NOISE = 0.25  # share of clips whose context has no noise, whatever `context_noise`
MOST_OWN = 0.6  # share of batches trained behind own frames, in the second half of the training
GENERATIONS = 3  # most re-drawings of a frame, each behind those of the generation before
REDRAWN_FROM = (0.15, 0.9)  # times, as shares of 1000, to which a true frame is noised before it is drawn again


def check_context(context: str, allowed: tuple[str, ...] = CONTEXTS, objective: Objective | None = None) -> None:
    """Raise ValueError for a context that is not allowed, or that the objective does not have."""
    if context not in allowed:
        raise ValueError(f"context: expected one of {', '.join(allowed)}, got {context!r}")
    if objective is not None and context not in objective.contexts:
        able = " or ".join(name for name in allowed if name in objective.contexts)
        raise ValueError(f"context: expected {able} with {objective.label}, got {context!r}")


def stream_context(trained: str) -> str:
    """The context with which to stream a model that was trained with a context of TRAINED_CONTEXTS."""
    return "clean" if trained == "self" else trained


def split_frames(video: Tensor, frames: int) -> Tensor:
    """(B, C, T, H, W) -> (B * frames, C, T / frames, H, W)."""
    return video.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)


def join_frames(parts: Tensor, frames: int) -> Tensor:
    """The inverse of `split_frames`."""
    return parts.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)


def add_noise(objective: Objective, video: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """`Objective.add_noise` for video and noise (B, C, T, H, W), with a time (B, T') for every frame of tokens."""
    frames = time.shape[1]
    noisy = objective.add_noise(split_frames(video, frames), split_frames(noise, frames), time.flatten())
    return join_frames(noisy, frames)


def finished_frames(
    model: Network,
    objective: Objective,
    video: Tensor,
    conditions: dict[str, Any],
    generator: torch.Generator,
    *,
    own: bool,
    context_noise: float,
    other_label: float,
    progress: float,
) -> dict[str, Tensor]:
    """The arguments `finished` and `finished_time` of a `VideoDiT` in training.

    A model that has only seen true frames does not know how to correct errors of its own, and a stream adds error to
    error. So part of the batches, a share that grows to MOST_OWN, is trained behind frames that the model has drawn
    itself: true frames are noised and drawn again in one evaluation, all frames together, each behind the frames of the
    generation before, up to GENERATIONS times. They lie where the true frames lie, so that the true frames remain the
    targets. With `other_label` some clips are drawn for another class. Then what lies behind a frame has changed its
    shape, as it does little by little in a long stream, and the model learns to hold on to the label and to the sink.
    (Self Forcing, Huang et al. 2025, arXiv 2506.08009, rolls out the stream itself instead, frame by frame.)

    Frames of a sink (`VideoDiT`) stay true and free of noise.

    Args:
        model: a `VideoDiT`, or a wrapper of one with the attribute `module`.
        objective: says what the network predicts.
        video: (B, C, T, H, W) in [-1, 1].
        conditions: arguments `labels`, `text` and `text_weight` of the model.
        generator: on the device of the video.
        own: whether the model's own frames are used.
        context_noise: up to 1; each finished frame gets noise of a time between 0 and this share of 1000.
        other_label: share of the clips that a generation draws for another class.
        progress: completed share of the training, 0 to 1.

    Returns:
        {"finished": (B, C, T, H, W)}, and if there is noise {"finished_time": (B, T')}.
    """
    config = getattr(model, "module", model).config
    batch, unit, sink = len(video), config["patch"][0], config.get("sink", 0)
    frames, device = video.shape[2] // unit, video.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def noise() -> Tensor:
        return torch.randn(video.shape, generator=generator, device=device, dtype=video.dtype)

    level = torch.zeros(batch, frames, device=device)
    if context_noise:
        level = context_noise * MAX_TIME * uniform(batch, frames) * (uniform(batch, 1) >= WITHOUT_NOISE)
        level[:, :sink] = 0

    def behind(clean: Tensor) -> dict[str, Tensor]:
        if not context_noise:
            return {"finished": clean}
        noised = (level > 0).repeat_interleave(unit, dim=1)[:, None, :, None, None]  # at time 0 DDPM has noise too
        finished = torch.where(noised, add_noise(objective, clean, noise(), level), clean)
        return {"finished": finished, "finished_time": level.to(video.dtype)}

    def other_labels(conditions: dict[str, Any]) -> dict[str, Any]:
        labels = conditions["labels"]
        if (
            not other_label or labels is None or labels.dim() != 1
        ):  # of actions, one for every frame, another would be another motion
            return conditions
        others = torch.randint(config["n_classes"] + 1, labels.shape, generator=generator, device=device)
        return conditions | {"labels": torch.where(uniform(batch) < other_label, others.to(labels.dtype), labels)}

    context = video
    if own and uniform(1).item() < MOST_OWN * min(1.0, 2 * progress):
        least, most = (MAX_TIME * share for share in REDRAWN_FROM)
        for _ in range(1 + int(GENERATIONS * uniform(1).item())):
            time = least + (most - least) * uniform(batch, frames)
            noisy = add_noise(objective, video, noise(), time)
            with torch.no_grad():
                given = other_labels(conditions) | behind(context)
                prediction = model(noisy, time.to(video.dtype), frame_causal=True, **given).to(video.dtype)
            parts = split_frames(noisy, frames), split_frames(prediction, frames)
            drawn = join_frames(objective.estimate(*parts, time.flatten()).clamp(-1, 1), frames)
            context = torch.cat([video[:, :, : sink * unit], drawn[:, :, sink * unit :]], dim=2)
    return behind(context)
