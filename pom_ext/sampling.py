"""Drawing images, and videos frame by frame."""

import torch
from tqdm.auto import tqdm

from ._random import seeded_generator
from .diffusion import FlowMatching, MeanFlow
from .diffusion.objectives import guided_prediction
from .diffusion.solvers import check_solver, denoise
from .streaming import VideoStream


@torch.no_grad()
def sample(
    model,
    labels,
    *,
    shape,
    objective=None,
    steps=None,
    guidance=None,
    solver="euler",
    seed=0,
    batch_size=100,
    progress=False,
):
    """Draw one image per label.

    Args:
        model: an `ImageDiT`; runs on the device and in the dtype of its parameters.
        labels: (B,) integers, 0 to n_classes; n_classes asks for an image of no class in particular.
        shape: (C, H, W) of an image.
        objective: what the model was trained for, `FlowMatching()` by default.
        steps: solver steps; None takes 30, for MeanFlow 1.
        guidance: see `guided_prediction`; None takes 3, for MeanFlow 1, since it has guidance trained in.
        solver: "euler" or, for flow matching, "heun". For noise prediction "euler" is DDIM.
        seed: image i depends on the seed and on i, not on the batch size or the device (but for rounding).
        batch_size: images drawn at once.
        progress: show a progress bar.

    Returns:
        (B, C, H, W) images on the model's device, trained range [-1, 1] but not clamped to it.

    Raises:
        ValueError: an argument out of the ranges above.
    """
    objective = FlowMatching() if objective is None else objective
    one_step = isinstance(objective, MeanFlow)
    steps = (1 if one_step else 30) if steps is None else steps
    guidance = (1.0 if one_step else 3.0) if guidance is None else guidance
    labels = torch.as_tensor(labels)
    _check(model, labels, shape)
    check_solver(objective, steps, guidance, solver)
    parameter = next(model.parameters())
    options = {"device": parameter.device, "dtype": parameter.dtype}

    def draw(indices):
        chosen = labels[indices].to(parameter.device)
        noise = torch.stack([torch.randn(shape, generator=seeded_generator(seed, i)) for i in indices])

        def predict(x, *times):
            time, *span = (torch.full((len(x),), float(t), **options) for t in times)
            if one_step:
                return model(x, time, chosen, *span)
            return guided_prediction(model, x, time, chosen, guidance)

        return denoise(predict, noise.to(**options), objective, steps, solver)

    batches = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
    bar = tqdm(batches, desc="sample", unit="batch", disable=not progress)
    drawn = [draw(list(indices)) for indices in bar]
    return torch.cat(drawn) if drawn else torch.empty(0, *shape, **options)


def _check(model, labels, shape):
    n_classes = model.config["n_classes"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels: expected integers (B,), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= n_classes):
        raise ValueError(
            f"labels: expected 0 to {n_classes} ({n_classes} is no class), got {int(labels.min())} to {int(labels.max())}"
        )
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: expected (C, H, W), got {tuple(shape)}")


def sample_frames(model, frames=None, labels=None, *, given=None, **options):
    """Draw a video with a `VideoDiT`, and yield each frame as soon as it is finished.

    Args:
        model: see `VideoStream`, which also explains the `options`.
        frames: how many to draw, counted as frames of tokens; None never ends.
        labels: (B,) classes; or (B, frames), one for each, such as actions.
        given: (B, C, T, H, W) first frames, to be continued. With labels for each frame these come first, so that there
            are T / patch[0] more of them.
        options: of `VideoStream`.

    Yields:
        (B, C, patch[0], H, W), trained range [-1, 1] but not clamped to it.

    Raises:
        ValueError, TypeError: as `VideoStream`, when the first frame is asked for.
    """
    each = labels is not None and torch.as_tensor(labels).dim() == 2
    constant = None if each else labels
    if each:
        labels = torch.as_tensor(labels)
        if frames is None:
            frames = labels.shape[1] - (0 if given is None else given.shape[2] // model.patch[0])
        options = {"batch": len(labels), **options}
    elif given is not None:
        options = {"batch": len(given), **options}
    stream = VideoStream(model, constant, **options)
    if given is not None:
        stream.watch(given, labels[:, : given.shape[2] // model.patch[0]] if each else None)
    if each and labels.shape[1] != stream.frame + frames:
        raise ValueError(
            f"labels: expected {stream.frame + frames} for each video, {stream.frame} given frames and {frames} to draw, "
            f"got {labels.shape[1]}"
        )
    drawn = 0
    while frames is None or drawn < frames:
        yield stream.next(labels[:, stream.frame] if each else None)
        drawn += 1
