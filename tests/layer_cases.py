"""Layers and the contexts that tests run them in."""

import torch

from pom_ext import PoM
from pom_ext.ops.rotary import AXES

LAYERS = {
    "product-default": {},
    "product-degree1-expand1": {"degree": 1, "expand": 1},
    "product-degree4-heads": {"degree": 4, "n_sel_heads": 8},
    "product-groups-nobias": {"degree": 3, "n_groups": 4, "bias": False},
    "power-default": {"form": "power"},
    "power-degree16": {"form": "power", "degree": 16, "expand": 1},
    "power-heads": {"form": "power", "degree": 3, "n_sel_heads": 4, "bias": True},
    "power-groups-heads": {"form": "power", "n_groups": 2, "n_sel_heads": 8},
    "power-1d": {"form": "power", "rope": "1d"},
    "power-2d-heads": {"form": "power", "degree": 3, "n_sel_heads": 8, "rope": "2d"},
    "power-3d-groups": {"form": "power", "expand": 3, "n_groups": 2, "rope": "3d"},
}


DIM, TOKENS = 12, 9


CONTEXTS = {
    "whole": {},
    "weight": {"weight": torch.tensor([[1.0] * TOKENS, [1, 2, 0, 0.5, 0, 0, 1, 1, 0]])},
    "mask": {"mask": torch.rand(2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.4},
    "causal": {"causal": True},
    "frames": {"frames": 3},
    "frames_unequal": {"frames": [0, 2, 2, 3, TOKENS]},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 4, 5, TOKENS])},
}


def build(name, device="cpu", dtype=torch.float32):
    return PoM(DIM, **LAYERS[name]).to(device, dtype)


def positions_of(layer, tokens, device):
    """Positional arguments of a layer that wants some: a grid, numbered along every axis."""
    if layer.rope is None:
        return {}
    return {
        "positions": torch.stack([torch.arange(tokens) // (axis + 1) for axis in range(AXES[layer.rope])], -1).to(
            device
        )
    }
