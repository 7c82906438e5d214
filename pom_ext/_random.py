"""Random numbers that depend on a key only, not on earlier draws."""

import numpy as np
import torch


def seeded_generator(*key, device="cpu"):
    """A random generator whose seed depends on the integers `key` only, such as (seed, index of the sample)."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)
