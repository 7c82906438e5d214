"""The exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the model's weights. Early on it forgets faster, since its first values are worth little.

    Args:
        model: to average.
        decay: of the average per update, below 1; the k-th update uses min(decay, (1 + k) / (10 + k)).
    """

    def update(averages, parameters, count):
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averages, parameters, 1 - rate)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))
