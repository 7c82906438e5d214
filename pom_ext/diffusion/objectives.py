"""What is learned: how noise is added to an image, what the network predicts of it, and how labels guide it.

Times are in the network's unit: 0 is the image, 1000 is noise. Images are scaled to [-1, 1].
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

TIME_SCALE = 1000
CONTEXTS = ("clean", "shared")  # what a frame of a video sees of those before: finished frames, or their noise
BASE_PIXELS = 32 * 32  # at this size noise levels are spread evenly; larger images need more noise to be hidden as well


def noise_shift(pixels, base_pixels=BASE_PIXELS):
    """Factor s by which the noise-to-signal ratio of an image of `pixels` must rise to hide as much of it as at
    `base_pixels`: neighbouring pixels repeat each other, so noise averages out by the square root of their number.

    `pixels` counts the positions the network is given, so latents where it works on latents.
    Source: Esser et al. 2024 (Stable Diffusion 3), arXiv 2403.03206, equation 23.
    """
    return math.sqrt(pixels / base_pixels)


def shift_time(time, shift):
    """t' = s t / (1 + (s - 1) t) for t in [0, 1]: multiplies the noise-to-signal ratio t / (1 - t) by s."""
    return shift * time / (1 + (shift - 1) * time)


def uniform_time(batch, generator):
    """(batch,) times in [0, 1), one from each of `batch` equal intervals: evenly spread in every batch."""
    offset = torch.rand(batch, generator=generator, device=generator.device)
    return (torch.arange(batch, device=generator.device) + offset) / batch


class FlowMatching:
    """Straight path from image to noise, x_t = (1 - t) x + t noise; the network predicts its velocity, noise - x.

    Args:
        shift: see `noise_shift`. Training draws, and sampling visits, more of the noisy times the larger it is.

    Source: Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003; logit-normal times: Esser et al.
    2024, arXiv 2403.03206, section 3.1.
    """

    def __init__(self, shift=1.0):
        self.shift = _positive("shift", shift)

    def draw_time(self, batch, generator):
        """(batch,) times to train on: logit-normal before the shift, so mostly where image and noise are both strong."""
        time = torch.special.ndtri(uniform_time(batch, generator)).sigmoid()
        return TIME_SCALE * shift_time(time, self.shift)

    def add_noise(self, clean, noise, time):
        """x_t for images and noise (B, ...) at times (B,)."""
        t = (time / TIME_SCALE).to(clean.dtype).view(-1, *[1] * (clean.dim() - 1))
        return (1 - t) * clean + t * noise

    def target(self, clean, noise):
        """What the network should answer."""
        return noise - clean


class NoisePrediction:
    """Denoising diffusion with 1000 noise levels; the network predicts the noise in the image.

    Args:
        shift: see `noise_shift`. It multiplies the noise-to-signal ratio of every level, so that a network must be
            sampled with the shift it was trained with.

    `scheduler` is the matching `diffusers.DDIMScheduler`.
    Source: Ho et al. 2020, arXiv 2006.11239 (linear betas); Song et al. 2021, arXiv 2010.02502 (sampling).
    """

    def __init__(self, shift=1.0):
        from diffusers import DDIMScheduler

        self.shift = _positive("shift", shift)
        signal = np.cumprod(1 - np.linspace(1e-4, 0.02, TIME_SCALE))
        signal = signal / (signal + self.shift**2 * (1 - signal))
        betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
        self.scheduler = DDIMScheduler(TIME_SCALE, trained_betas=betas, timestep_spacing="trailing")

    def draw_time(self, batch, generator):
        """(batch,) integer times to train on."""
        return (TIME_SCALE * uniform_time(batch, generator)).long().clamp(max=TIME_SCALE - 1)

    def add_noise(self, clean, noise, time):
        """x_t for images and noise (B, ...) at times (B,), cut to integers."""
        return self.scheduler.add_noise(clean, noise, time.long())

    def target(self, clean, noise):
        """What the network should answer."""
        return noise


class MeanFlow(FlowMatching):
    """The mean velocity over a span of time before t: one step from noise to image. The loss: `meanflow.meanflow_loss`.

    The network has two times (`ImageDiT(two_times=True)`), and over no span answers as for flow matching.

    Args:
        shift: of the times to train on, as for flow matching.
        guidance: trained into the network, which then needs one evaluation for a guided image. 1 is none.

    Source: Geng et al. 2025, arXiv 2505.13447.
    """

    INSTANT = 0.5  # share of samples trained without a span
    VELOCITY_FIRST = 0.4  # share of the training with flow matching alone: first a velocity, then the mean of it

    def __init__(self, shift=1.0, guidance=1.0):
        super().__init__(shift)
        self.guidance = _positive("guidance", guidance)

    def draw_times(self, batch, generator):
        """(batch,) times, and spans before them that end at or after 0."""
        one, other = self.draw_time(batch, generator), self.draw_time(batch, generator)
        options = {"generator": generator, "device": generator.device}
        other = other[torch.randperm(batch, **options)]  # evenly spread times come in order
        other = torch.where(torch.rand(batch, **options) < self.INSTANT, one, other)
        return torch.maximum(one, other), (one - other).abs()


OBJECTIVES = {"flow": FlowMatching, "noise": NoisePrediction, "meanflow": MeanFlow}


def build_objective(name, shift=1.0, **options):
    """The objective of a name in OBJECTIVES: "flow", "noise" or "meanflow", which alone has `options`.

    Raises:
        ValueError: another name, or a shift that is not positive.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name](shift, **options)


def _positive(name, value):
    if not (0 < value < math.inf):
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return float(value)


def diffusion_loss(model, objective, images, labels, generator):
    """Mean squared error of the network's prediction at random times.

    images (B, C, H, W) in [-1, 1] and labels (B,); noise and times come from `generator`, on the images' device.
    """
    time = objective.draw_time(len(images), generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    prediction = model(objective.add_noise(images, noise, time), time.to(images.dtype), labels)
    return F.mse_loss(prediction.to(images.dtype), objective.target(images, noise))


def video_loss(model, objective, video, labels, generator, *, context="clean", context_noise=0.0, given=0, **text):
    """Mean squared error of a `VideoDiT`'s prediction at random times, all frames in one pass.

    Args:
        video: (B, C, T, H, W) in [-1, 1].
        labels: (B,) or (B, T'), with T' = T / patch[0] frames of tokens; None for a model without.
        generator: of noise and times, on the device of the video.
        context: "clean": every frame has a time of its own, and sees the frames before it as they are in `video`: what
            one by one would give (diffusion forcing, Chen et al. 2024, arXiv 2407.01392, with the context finished).
            "shared": all frames have one time, and see each other's noise (arXiv 2411.12663).
        context_noise: up to 1; the finished frames of a video are shown at a time of their own, between 0 and this share
            of 1000. A model that knows noisy contexts need not trust its own frames blindly (`VideoStream`).
        given: so many first frames of tokens are shown without noise and do not count.
        text: arguments `text` and `text_weight` of the model.

    Raises:
        ValueError: an unknown context, or no frame left to predict.
    """
    check_context(context)
    unit = getattr(model, "module", model).config["patch"][0]
    batch, frames = len(video), video.shape[2] // unit
    if not 0 <= given < frames:
        raise ValueError(f"given: expected 0 to {frames - 1} of {frames} frames, got {given}")

    def fold(video):  # (B, C, T, H, W) -> (B * T', C, t, H, W)
        return video.unflatten(2, (frames, unit)).transpose(1, 2).flatten(0, 1)

    if context == "clean":  # evenly spread times come in order: shuffle them
        order = torch.randperm(batch * frames, generator=generator, device=video.device)
        time = objective.draw_time(batch * frames, generator)[order]
    else:
        time = objective.draw_time(batch, generator).repeat_interleave(frames)
    noise = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    noisy = objective.add_noise(fold(video), fold(noise), time)
    noisy = noisy.unflatten(0, (batch, frames)).transpose(1, 2).flatten(2, 3)  # (B, C, T, H, W)
    time = time.to(video.dtype).view(batch, frames)
    if given:
        noisy = torch.cat([video[:, :, : given * unit], noisy[:, :, given * unit :]], dim=2)
        time = torch.cat([torch.zeros_like(time[:, :given]), time[:, given:]], dim=1)
    finished = {}
    if context == "clean":
        finished = {"finished": video}
        if context_noise:
            level = context_noise * TIME_SCALE * torch.rand(batch, generator=generator, device=video.device)
            noise_there = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
            finished = {
                "finished": objective.add_noise(video, noise_there, level),
                "finished_time": level.to(video.dtype),
            }
    prediction = model(noisy, time, labels=labels, frame_causal=True, **finished, **text).to(video.dtype)
    return F.mse_loss(prediction[:, :, given * unit :], objective.target(video, noise)[:, :, given * unit :])


def check_context(context):
    if context not in CONTEXTS:
        raise ValueError(f"context: expected one of {', '.join(CONTEXTS)}, got {context!r}")


def drop_labels(labels, no_class, probability, generator):
    """Replace each label (B, ...) by `no_class` with the given probability: what teaches the network to draw unguided.

    The labels of one sample, such as the actions of its frames, are kept or dropped together.
    """
    dropped = torch.rand(len(labels), generator=generator, device=labels.device) < probability
    return labels.masked_fill(dropped.view(-1, *[1] * (labels.dim() - 1)), no_class)


def guided_prediction(model, images, time, labels, guidance):
    """Classifier-free guidance: u + guidance (c - u), with c the prediction for the labels and u without them.

    guidance 1 is the plain conditional prediction, at half the cost; 0 ignores the labels. Both halves are one call.
    Source: Ho & Salimans 2022, arXiv 2207.12598.
    """
    if guidance == 1:
        return model(images, time, labels)
    no_class = torch.full_like(labels, model.config["n_classes"])
    both = model(torch.cat([images, images]), torch.cat([time, time]), torch.cat([labels, no_class]))
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
