"""Random numbers that depend on a key alone, not on what was drawn before."""

import numpy as np
import torch


def seeded_generator(*key, device="cpu"):
    """A random generator that depends on the integers `key` alone, such as (seed, index of the sample)."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)
