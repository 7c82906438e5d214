"""The polynomial mixer in plain torch, written to be read: the specification and the oracle of the tests.

Every context mode is one thing here, a matrix of weights that says how much of each context token each
group sees. Nothing in the package calls this module in place of a compiled operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def features(u: Tensor, coeff: Tensor | None = None, *, form: str, degree: int) -> Tensor:
    """φ(u): polynomial features of each token.

    product (arXiv 2411.12663, davidpicard/HoMM `high_order_aggregation_`): u (..., degree * E) -> (..., degree * E)
    power (arXiv 2604.06129, davidpicard/pom `polynomial_aggregation_`): u (..., E), coeff (E, degree) -> (..., E)
    """
    if form == "product":
        factors = F.gelu(u).chunk(degree, dim=-1)
        products = [factors[0]]
        for factor in factors[1:]:
            products.append(products[-1] * factor)
        return torch.cat(products, dim=-1)
    a = F.leaky_relu(u, 0.01)
    # Held to [-0.1, 6]. At a bound the slope is that inside, as torch.clamp's is up to 2.13; from 2.14 on that is zero.
    a = torch.where((a < -0.1) | (a > 6), a.detach().clamp(-0.1, 6), a)
    assert coeff is not None
    return sum((coeff[:, i] * a ** (i + 1) for i in range(degree)), torch.zeros((), dtype=a.dtype))


def gate_value(gate: Tensor, *, form: str) -> Tensor:
    """γ(g): sigmoid in product form, hardsigmoid in power form."""
    return torch.sigmoid(gate) if form == "product" else F.hardsigmoid(gate)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, axes: int = 1) -> Tensor:
    """Rotate channel pairs of x (B, N, C) by per-token angles cos, sin (N, axes * half).

    Axis i owns channels [2 * half * i, 2 * half * (i + 1)); channel p of its first half pairs with channel p of its
    second half. Channels past the last axis are left alone. (davidpicard/pom:pom/pom_rope.py)
    """
    half = cos.shape[-1] // axes
    blocks = x[..., : 2 * half * axes].unflatten(-1, (axes, 2, half))
    cos, sin = cos.unflatten(-1, (axes, half)), sin.unflatten(-1, (axes, half))
    low, high = blocks[..., 0, :], blocks[..., 1, :]
    rotated = torch.stack([low * cos - high * sin, high * cos + low * sin], dim=-2)
    return torch.cat([rotated.flatten(-3), x[..., 2 * half * axes :]], dim=-1)


def context_weights(batch, tokens, *, weight=None, mask=None, causal=False, frames=None, cu_seqlens=None, like):
    """Who sees whom, as one (B, G, N) matrix. `frames` and `cu_seqlens` are offsets: 0, ..., N."""
    if mask is not None:
        return mask.to(like)
    token = torch.arange(tokens)
    if causal:
        seen = token[None, :] <= token[:, None]
    elif frames is not None:
        seen = token[None, :] < torch.as_tensor(frames)[1:, None]
    elif cu_seqlens is not None:
        ends = torch.as_tensor(cu_seqlens)
        seen = (token[None, :] >= ends[:-1, None]) & (token[None, :] < ends[1:, None])
    else:
        seen = torch.ones(1, tokens, dtype=torch.bool)
    seen = seen.to(like).expand(batch, -1, -1)
    return seen if weight is None else seen * weight.to(like)[:, None, :]


def state(u, coeff=None, *, form, degree, rotary=None, **context):
    """S = Σ w φ(u) and n = Σ w for every group: (B, G, C), (B, G). `rotary` is (cos, sin, axes)."""
    phi = features(u, coeff, form=form, degree=degree)
    if rotary is not None:
        phi = rotate(phi, *rotary)
    weights = context_weights(u.shape[0], u.shape[1], like=phi, **context)
    return weights @ phi, weights.sum(dim=-1)


def readout(gate, total, count, *, form, n_sel_heads=1, rotary=None, query_offsets=None):
    """y = γ(g) ⊙ S / n, each query token reading its group's state; 0 where n = 0.

    Queries are divided among the groups evenly and in order, or by `query_offsets` (G + 1).
    """
    mean = torch.where(count[..., None] > 0, total / torch.where(count > 0, count, 1)[..., None], 0)
    groups, queries = mean.shape[1], gate.shape[1]
    lengths = (
        torch.full((groups,), queries // groups) if query_offsets is None else torch.as_tensor(query_offsets).diff()
    )
    g = gate_value(gate, form=form)
    if rotary is not None:
        g = rotate(g, *rotary)
    if n_sel_heads > 1:
        g = g.repeat_interleave(mean.shape[-1] // n_sel_heads, dim=-1)
    return g * mean.repeat_interleave(lengths.to(mean.device), dim=1)


def mix(u, gate, coeff=None, *, form, degree, n_sel_heads=1, rotary=None, gate_rotary=None, **context):
    """The whole operation: state, then readout. u (B, N, ·), gate (B, M, C or heads) -> (B, M, C)."""
    total, count = state(u, coeff, form=form, degree=degree, rotary=rotary, **context)
    offsets = context.get("frames") if context.get("frames") is not None else context.get("cu_seqlens")
    return readout(gate, total, count, form=form, n_sel_heads=n_sel_heads, rotary=gate_rotary, query_offsets=offsets)
