"""Layers with projections of their own, held against their definition."""

import torch
import torch.nn.functional as F
from cases import FLOOR, norm_error

from pom_ext import PoM
from pom_ext.ops import reference

LAYERS = {
    "power-heads": {"form": "power", "degree": 3, "n_sel_heads": 4},
    "power-heads-bias-2d": {"form": "power", "n_sel_heads": 8, "bias": True, "rope": "2d"},
    "power": {"form": "power", "degree": 3, "rope": "1d"},
    "product": {"degree": 3},
    "product-heads": {"degree": 2, "n_sel_heads": 4, "bias": False},
}
TOKENS, DIM = 70, 16
CONTEXTS = {
    "whole": {},
    "weight": {"weight": torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0))},
    "frames": {"frames": 10},
    "frames_unequal": {"frames": [0, 3, 3, 40, TOKENS]},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0, 5, 64, TOKENS])},
    "many sequences": {"cu_seqlens": torch.arange(TOKENS + 1)},  # so many that folding does not pay
    "frames+weight": {"frames": 14, "weight": torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1))},
}
MEMORY = ("store", "recompute")


def build(name, dim=DIM, dtype=torch.float32, **options):
    return PoM(dim, **LAYERS[name], **options).to(dtype)


def positions_of(layer, tokens):
    if layer.rope != "2d":
        return {}
    return {"positions": torch.stack([torch.arange(tokens) // 8, torch.arange(tokens) % 8], -1)}


def definition(layer, x, context, dtype):
    """The layer in plain torch in one dtype, as a function of x and its parameters."""
    weights = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
    x = x.detach().to(dtype).requires_grad_()
    project = lambda name, t: F.linear(t, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    positions = positions_of(layer, x.shape[1]).get("positions")
    tables = [
        t and t._replace(cos=t.cos.to(dtype), sin=t.sin.to(dtype)) for t in layer._rotaries(x, x, positions, None)
    ]
    modes = {name: value.to(dtype) if name == "weight" else value for name, value in context.items()}
    if isinstance(modes.get("frames"), int):
        modes["frames"] = range(0, x.shape[1] + 1, modes["frames"])
    mixed = reference.mix(
        project("context_proj", x),
        project("gate_proj", x),
        weights.get("coeff"),
        form=layer.form,
        degree=layer.degree,
        n_sel_heads=layer.n_sel_heads,
        rotary=tables[0],
        gate_rotary=tables[1],
        **modes,
    )
    return project("out_proj", mixed), x, weights


def with_gradients(y, x, weights, grad):
    grads = torch.autograd.grad(y, [x, *weights.values()], grad.to(y.dtype))
    return {"y": y.detach(), "grad x": grads[0], **{f"grad {name}": g for name, g in zip(weights, grads[1:])}}


def check(layer, x, context, dtype):
    """Outputs and gradients at most twice as far from the float64 definition as plain torch, plus a rounding floor."""
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    grad = (1 + torch.randn(x.shape)) / x.shape[1]
    y = layer(x, **context, **positions_of(layer, x.shape[1]))
    with torch.no_grad():
        unrecorded = layer(x, **context, **positions_of(layer, x.shape[1]))
    results = with_gradients(y, x, dict(layer.named_parameters()), grad) | {"y without gradients": unrecorded}
    exact, plain = (with_gradients(*definition(layer, x, context, d), grad) for d in (torch.float64, dtype))
    for name, result in results.items():
        of = name.removesuffix(" without gradients")
        assert result.dtype == dtype and result.shape == exact[of].shape, name
        error, bound = norm_error(result, exact[of]), 2 * norm_error(plain[of], exact[of]) + FLOOR[dtype]
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
