"""Drawing images: from noise to image along the path that the network has learned."""

import itertools
import math

import torch
from tqdm.auto import tqdm

from .diffusion import TIME_SCALE, FlowMatching, guided_prediction, seeded_generator, shift_time

SOLVERS = ("euler", "heun")


def integrate(velocity, x, times, solver="euler"):
    """Follow dx/dt = velocity(x, t) through `times`, a sequence of numbers, and return x at the last of them.

    "euler" evaluates the velocity once a step and is of order 1, "heun" twice and of order 2. All arithmetic is in
    the dtype of x (the flow-matching schedulers of diffusers, otherwise the same, go through float32).
    """
    for now, after in itertools.pairwise(times):
        slope = velocity(x, now)
        if solver == "heun":
            slope = (slope + velocity(x + (after - now) * slope, after)) / 2
        x = x + (after - now) * slope
    return x


def flow_times(steps, shift=1.0):
    """The steps + 1 times 1 = t_0 > ... > t_steps = 0 that a sampler visits, shifted towards noise."""
    return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]


def denoise_ddim(predict, x, scheduler, steps):
    """Deterministic DDIM, with the schedule of `NoisePrediction.scheduler`; predict(x, time) is the noise in x."""
    scheduler.set_timesteps(steps, device=x.device)
    for time in scheduler.timesteps:
        x = scheduler.step(predict(x, time), time, x).prev_sample
    return x


@torch.no_grad()
def sample(
    model,
    labels,
    *,
    shape,
    objective=None,
    steps=30,
    guidance=3.0,
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
        steps: solver steps.
        guidance: see `guided_prediction`.
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
    flow = isinstance(objective, FlowMatching)
    labels = torch.as_tensor(labels)
    _check(model, labels, shape, steps, guidance, solver, flow)
    parameter = next(model.parameters())
    options = {"device": parameter.device, "dtype": parameter.dtype}

    def draw(indices):
        chosen = labels[indices].to(parameter.device)
        noise = torch.stack([torch.randn(shape, generator=seeded_generator(seed, i)) for i in indices])

        def predict(x, time):
            return guided_prediction(model, x, torch.full((len(x),), float(time), **options), chosen, guidance)

        noise = noise.to(**options)
        if flow:
            times = flow_times(steps, objective.shift)
            return integrate(lambda x, t: predict(x, TIME_SCALE * t), noise, times, solver)
        return denoise_ddim(predict, noise, objective.scheduler, steps)

    batches = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
    bar = tqdm(batches, desc="sample", unit="batch", disable=not progress)
    drawn = [draw(list(indices)) for indices in bar]
    return torch.cat(drawn) if drawn else torch.empty(0, *shape, **options)


def _check(model, labels, shape, steps, guidance, solver, flow):
    n_classes = model.config["n_classes"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"labels: expected integers (B,), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= n_classes):
        raise ValueError(
            f"labels: expected 0 to {n_classes} ({n_classes} is no class), got {int(labels.min())} to {int(labels.max())}"
        )
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: expected (C, H, W), got {tuple(shape)}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance: expected a number of at least 0, got {guidance}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {list(SOLVERS)}, got {solver!r}")
    if solver == "heun" and not flow:
        raise ValueError("solver: 'heun' is for flow matching; use 'euler' with noise prediction")
