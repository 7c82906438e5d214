"""Calls of the fused kernels."""

from types import SimpleNamespace

import torch

from pom_ext.ops import reference
from pom_ext.ops.checks import FORMS


def draw_state_call(context, dtype, bias, degree=3, batch=2, tokens=150, dim=72, width=264, prior=False):
    x = torch.randn(batch, tokens, dim).to(dtype)
    total = torch.randn(batch, 1, width) * 50 if prior else None
    weight = (torch.randn(width, dim) / dim**0.5).to(dtype)
    return SimpleNamespace(
        x=x,
        weight=weight,
        bias=torch.randn(width).to(dtype) if bias else None,
        coeff=torch.randn(width, degree),
        token_weight=torch.rand(batch, tokens) if "weight" in context else None,
        offsets=None if context in ("whole", "weight") else torch.tensor([0, 10, 10, 100, tokens]),
        cumulative="cumulative" in context,
        total=total,
        residual=total * 2.0**-26 if prior else None,
        count=torch.rand(batch, 1, dtype=torch.float64) if prior else None,
        degree=degree,
    )


def arguments(call, device):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in vars(call).values()]


def state_of(call, dtype):
    """By the definition, and its projections by plain torch, in one dtype."""
    bias = None if call.bias is None else call.bias.to(dtype)
    u = torch.nn.functional.linear(call.x.to(dtype), call.weight.to(dtype), bias)
    frames = {} if call.offsets is None else {"frames" if call.cumulative else "cu_seqlens": call.offsets.tolist()}
    weight = None if call.token_weight is None else call.token_weight.to(dtype)
    total, count = reference.state(u, call.coeff.to(dtype), form="power", degree=call.degree, weight=weight, **frames)
    if call.total is None:
        return total, count
    return total + call.total.to(dtype) + call.residual.to(dtype), count + call.count.to(dtype)


def draw_readout_call(context, dtype, bias, form="power", heads=8, width=16, batch=2, queries=60, dim=72, out_dim=40):
    groups = {"whole": 1, "even": 4, "offsets": 5}[context]
    exact = lambda *shape: torch.randn(*shape)
    drawn = lambda *shape: torch.randn(*shape).to(dtype)
    return SimpleNamespace(
        x=drawn(batch, queries, dim),
        gate_weight=(exact(heads, dim) / dim**0.5).to(dtype),
        gate_bias=drawn(heads) if bias else None,
        total=10 * exact(batch, groups, heads * width),
        residual=1e-6 * exact(batch, groups, heads * width),
        count=5 + torch.rand(batch, groups, dtype=torch.float64),
        out_weight=(exact(out_dim, heads * width) / (heads * width) ** 0.5).to(dtype),
        out_bias=drawn(out_dim) if bias else None,
        offsets=torch.tensor([0, 7, 7, 20, 59, queries]) if context == "offsets" else None,
        form=FORMS.index(form),
    )


def read(call, dtype):
    """By the definition and plain torch, in one dtype."""
    t = SimpleNamespace(**{k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in vars(call).items()})
    gate = torch.nn.functional.linear(t.x, t.gate_weight, t.gate_bias)
    offsets = None if call.offsets is None else call.offsets.tolist()
    mixed = reference.readout(
        gate, t.total + t.residual, call.count, form=FORMS[call.form], n_sel_heads=len(call.gate_weight),
        query_offsets=offsets,
    )  # fmt: skip
    return torch.nn.functional.linear(mixed.to(dtype), t.out_weight, t.out_bias)
