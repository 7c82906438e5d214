"""Training a network to go from noise to image in one step: the loss of MeanFlow, and the derivative it needs."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import forward_mode
from .objectives import TIME_SCALE

WEIGHT_FLOOR = 1e-3


def meanflow_loss(model, objective, images, labels, generator):
    """Squared error of the mean velocity u over the span that ends at time t, from the identity that defines it:

        u(x_t, t, span) = v - span * d/dt u(x_t, t, span),   d/dt along the path: dx/dt = v, dt/dt = dspan/dt = 1

    The right side is computed by a derivative in forward mode, one pass together with the left, and held constant. With
    guidance w, v is w (noise - image) + (1 - w) u(x_t, t, 0) of no class. Samples weigh 1 / (error + 0.001), so that
    those with a large derivative do not drown the others.

    Args:
        model: an `ImageDiT` with two times.
        objective: `MeanFlow`.
        images: (B, C, H, W) in [-1, 1].
        labels: (B,).
        generator: of noise and times, on the device of the images.

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

    one = torch.full_like(time, TIME_SCALE)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no derivative in forward mode
        mean, change = forward_mode.jvp(
            lambda *at: model(*at[:2], labels, at[2]), (noisy, time, span), (velocity, one, one)
        )
    share = (span / TIME_SCALE).view(-1, 1, 1, 1)
    target = velocity - share * change.to(images.dtype).detach()
    error = (mean.to(images.dtype) - target).square().flatten(1).mean(1)  # (B,)
    weight = 1 / (error.detach() + WEIGHT_FLOOR)
    return (weight * error).sum() / weight.sum()
