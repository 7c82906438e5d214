"""The order of the training data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .._random import seeded_generator


class ShuffledBatches(Sampler):
    """Endless batches of indices. Batch i depends on the seed and on i alone, so training can resume at any batch.

    Args:
        length: of the data set.
        batch_size: indices per batch; fewer if the data set has fewer.
        seed: of the order.
        start: number of the first batch.
        stride: every so many batches, for one of several processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, stride: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.start, self.stride = length, batch_size, seed, start, stride

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = max(1, self.length // self.batch_size)
        shuffled = None
        for batch in itertools.count(self.start, self.stride):
            epoch, position = divmod(batch, per_epoch)
            if epoch != shuffled:
                order, shuffled = torch.randperm(self.length, generator=seeded_generator(self.seed, epoch)), epoch
            yield order[position * self.batch_size : (position + 1) * self.batch_size].tolist()
