"""Baselines: the formula in plain torch, step by step as in the authors' code, and attention.

Product form: arXiv 2411.12663, davidpicard/HoMM `src/model/network/layers.py`. Power form: arXiv 2604.06129,
davidpicard/pom `pom/pom.py`.
"""

import importlib.util
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

AUTHORS = ("authors",) if importlib.util.find_spec("pom") else ()  # davidpicard/pom


def features(u, coeff, form, degree):
    """Polynomial features of every token, (B, N, C); every step stores a tensor."""
    if form == "product":
        products = list(F.gelu(u).chunk(degree, dim=-1))
        for i in range(1, degree):
            products[i] = products[i] * products[i - 1]
        return torch.cat(products, dim=-1)
    a = torch.clamp(F.leaky_relu(u, 0.01), -0.1, 6).unsqueeze(-1)
    powers = [a]
    for _ in range(degree - 1):
        powers.append(powers[-1] * a)
    return (torch.cat(powers, dim=-1) * coeff).sum(-1)


def mean(phi):
    return phi.mean(dim=1, keepdim=True)


def masked_running_mean(phi):
    """Mean over each token and those before it, by a product with the lower-triangular mask matrix."""
    batch, tokens, _ = phi.shape
    seen = torch.ones(tokens, tokens, dtype=phi.dtype, device=phi.device).tril().expand(batch, -1, -1)
    return torch.einsum("bnc,bmn->bmc", phi, seen) / seen.sum(dim=2, keepdim=True)


def running_mean(phi):
    """The same by running sums, linear in tokens: the best that plain torch can do."""
    return phi.cumsum(dim=1) / torch.arange(1, phi.shape[1] + 1, dtype=phi.dtype, device=phi.device)[:, None]


def gated(gate, h, form):
    """γ(gate) ⊙ h, with h (B, 1 or M, C) and a gate for every channel or for every head of channels."""
    gate = torch.sigmoid(gate) if form == "product" else F.hardsigmoid(gate)
    heads = gate.shape[-1]
    return (gate.unsqueeze(-1) * h.unflatten(-1, (heads, -1))).flatten(-2)


def plain_layer(layer, x):
    """The forward of a `pom_ext.PoM` with its own weights, in plain torch."""
    h = mean(features(layer.context_proj(x), layer.coeff, layer.form, layer.degree))  # (B, 1, C)
    return layer.out_proj(gated(layer.gate_proj(x), h, layer.form))  # (B, N, D)


def authors_op(u, coeff, gate, degree, heads, mask):
    """The op of the package `pom`, on a GPU its Triton kernels: the mean features, and with a gate the whole mix.

    mask: None, "causal", or a weight (B, N) for every token.
    """
    from pom import pom
    from pom.pom import polynomial_aggregation_

    if gate is None:
        return polynomial_aggregation_(u, coeff, degree, mask)
    return pom(F.hardsigmoid(gate), u, coeff, degree, heads, mask)


class Attention(nn.Module):
    """Multi-head self-attention on torch's own kernel, on a GPU the flash kernel."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if x.is_cuda else nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # (B, N, D)
