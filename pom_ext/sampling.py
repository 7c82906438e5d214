"""Drawing images, and videos frame by frame."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._random import seeded_generator
from .diffusion import FlowMatching, Objective
from .diffusion.guidance import guided_prediction
from .diffusion.objectives import check_objective
from .diffusion.solvers import check_solver
from .models import ImageDiT, VideoDiT
from .streaming import VideoStream


@torch.no_grad()
def sample(
    model: ImageDiT,
    labels: Tensor,
    *,
    shape: tuple[int, int, int],
    objective: Objective | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str = "euler",
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = False,
) -> Tensor:
    """Draw one image per label.

    Args:
        model: an `ImageDiT`; runs on the device and in the dtype of its parameters.
        labels: (B,) integers, 0 to n_classes; n_classes asks for an image of no class in particular.
        shape: (C, H, W) of an image.
        objective: what the model was trained for, `FlowMatching()` by default.
        steps: solver steps; None takes those of the objective: 30, for MeanFlow 1.
        guidance: classifier-free guidance, see `diffusion.guidance`; None takes that of the objective: 3, for MeanFlow
            1, since it has guidance trained in.
        solver: "euler" or, for flow matching, "heun". For noise prediction "euler" is DDIM.
        seed: image i depends on the seed and on i, not on the batch size or the device (except for rounding).
        batch_size: images drawn at once.
        progress: show a progress bar.

    Returns:
        (B, C, H, W) images on the model's device, trained range [-1, 1] but not clamped to it.

    Raises:
        ValueError: an argument out of the ranges above.
    """
    objective = FlowMatching() if objective is None else objective
    check_objective(objective)
    steps = objective.default_steps if steps is None else steps
    guidance = objective.default_guidance if guidance is None else guidance
    labels = torch.as_tensor(labels)
    _check(model, labels, shape)
    check_solver(objective, steps, guidance, solver)
    parameter = next(model.parameters())
    options = {"device": parameter.device, "dtype": parameter.dtype}

    def draw(indices):
        chosen = labels[indices].to(parameter.device)
        noise = torch.stack([torch.randn(shape, generator=seeded_generator(seed, i)) for i in indices])

        def predict(x, *times):  # the time, and the span if the objective has one
            time, *span = (torch.full((len(x),), float(t), **options) for t in times)
            return guided_prediction(model, x, time, chosen, guidance, *span)

        return objective.denoise(predict, noise.to(**options), steps, solver)

    batches = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
    bar = tqdm(batches, desc="sample", unit="batch", disable=not progress)
    drawn = [draw(list(indices)) for indices in bar]
    return torch.cat(drawn) if drawn else torch.empty(0, *shape, **options)


def _check(model: ImageDiT, labels: Tensor, shape: tuple[int, ...]) -> None:
    n_classes = model.config["n_classes"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels: expected integers (B,), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) <= n_classes):
        raise ValueError(
            f"labels: expected 0 to {n_classes} ({n_classes} is no class), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: expected (C, H, W), got {tuple(shape)}")


def sample_frames(
    model: VideoDiT,
    frames: int | None = None,
    labels: Tensor | None = None,
    *,
    given: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Draw a video with a `VideoDiT`, and yield each frame as soon as it is finished.

    Args:
        model: see `VideoStream`.
        frames: how many to draw, counted as frames of tokens; None never ends.
        labels: (B,) classes; or (B, frames), one for each frame, such as actions.
        given: (B, C, T, H, W) first frames, to be continued. If there are labels for each frame, the given frames have
            theirs too: (B, T / patch[0] + frames).
        options: arguments of `VideoStream`.

    Yields:
        (B, C, patch[0], H, W), trained range [-1, 1] but not clamped to it.

    Raises:
        ValueError, TypeError: as `VideoStream`, when the first frame is asked for.
    """
    per_frame = labels is not None and torch.as_tensor(labels).dim() == 2
    actions = torch.as_tensor(labels) if per_frame else None
    videos = given if actions is None else actions
    if videos is not None:
        options = {"batch": len(videos), **options}
    stream = VideoStream(model, None if per_frame else labels, **options)
    if given is not None:
        stream.prefill(given, None if actions is None else actions[:, : given.shape[2] // model.patch[0]])
    if actions is not None:
        frames = actions.shape[1] - stream.frame if frames is None else frames
        if actions.shape[1] != stream.frame + frames:
            raise ValueError(
                f"labels: expected {stream.frame + frames} for each video, {stream.frame} given frames and {frames} to "
                f"draw, got {actions.shape[1]}"
            )
    for _ in itertools.count() if frames is None else range(frames):
        yield stream.next(None if actions is None else actions[:, stream.frame])
