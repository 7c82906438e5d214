"""Conditions of small video models, and streams compared."""

import pytest
import torch

SOLVER = pytest.mark.parametrize("solver", ["euler", "heun"])
GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 2.5])
CONTEXT = pytest.mark.parametrize("context", ["clean", "shared"])


def conditions(model, batch=2):
    """Conditions of a stream, for the model."""
    generator = torch.Generator().manual_seed(3)
    given = {"batch": batch}
    if model.text_dim:
        text = torch.randn(batch, 5, model.text_dim, generator=generator, dtype=torch.float64)
        given |= {"text": text, "text_weight": torch.rand(batch, 5, generator=generator, dtype=torch.float64)}
    if model.n_classes:
        given["labels"] = torch.arange(batch) % model.n_classes
    return given


def draw(stream, frames):
    return torch.cat([stream.next() for _ in range(frames)], dim=2)


def same(stream, other):
    """Both remember the same, bit for bit."""
    pairs = zip(stream.caches, other.caches, strict=True)
    return stream.frame == other.frame and all(
        torch.equal(a, b)
        for p, q in pairs
        for a, b in zip(p.state_dict().values(), q.state_dict().values(), strict=True)
    )
