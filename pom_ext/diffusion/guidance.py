"""Classifier-free guidance: predictions with and without conditions, and the label dropout that training needs for it.

Source: Ho & Salimans 2022, arXiv 2207.12598.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .network import Network


def num_copies(guidance: float) -> int:
    """How often each sample is in the batch: once at guidance 1, which is none; else with and without its conditions."""
    return 1 if guidance == 1 else 2


def append_unconditional_labels(labels: Tensor, no_class: int) -> Tensor:
    """(B, ...) labels -> (2 B, ...): the labels, then `no_class` for every sample."""
    return torch.cat([labels, torch.full_like(labels, no_class)])


def append_empty_text(text: Tensor, text_weight: Tensor | None) -> dict[str, Tensor]:
    """Text (B, L, D) and its weights (B, L), None for 1 -> both (2 B, ...): the texts, then empty ones (weight 0)."""
    weight = text.new_ones(text.shape[:2]) if text_weight is None else text_weight
    return {"text": text.repeat(2, 1, 1), "text_weight": torch.cat([weight, torch.zeros_like(weight)])}


def apply_guidance(prediction: Tensor, guidance: float) -> Tensor:
    """u + guidance (c - u), from a prediction (2 B, ...) that holds c, with conditions, then u, without -> (B, ...).

    guidance 1 is the conditional prediction, which is then given alone, (B, ...); 0 ignores the conditions.
    """
    if num_copies(guidance) == 1:
        return prediction
    conditional, unconditional = prediction.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def guided_prediction(
    model: Network, images: Tensor, time: Tensor, labels: Tensor, guidance: float, *interval: Tensor
) -> Tensor:
    """The guided prediction of a class-conditional model, in one call of the model.

    Args:
        model: called as model(images, time, labels, *interval); label model.config["n_classes"] means "no class".
        images: (B, C, H, W), noisy.
        time: (B,) in [0, MAX_TIME].
        labels: (B,) integers.
        guidance: strength, see `apply_guidance`. Other than 1 it doubles the cost.
        interval: (B,) each, further times that the model takes, such as the span of `MeanFlow`.

    Returns:
        (B, C, H, W).
    """
    if num_copies(guidance) == 1:
        return model(images, time, labels, *interval)
    images, time, *repeated = (torch.cat([t, t]) for t in (images, time, *interval))
    labels = append_unconditional_labels(labels, model.config["n_classes"])
    return apply_guidance(model(images, time, labels, *repeated), guidance)


def drop_labels(labels: Tensor, no_class: int, probability: float, generator: torch.Generator) -> Tensor:
    """Replace each label (B, ...) by `no_class` with the given probability, so that the model learns to draw without.

    The labels of one sample, such as the actions of its frames, are kept or dropped together.
    """
    dropped = torch.rand(len(labels), generator=generator, device=labels.device) < probability
    return labels.masked_fill(dropped.view(-1, *[1] * (labels.dim() - 1)), no_class)
