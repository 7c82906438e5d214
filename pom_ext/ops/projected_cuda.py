"""The operations of `projected` on a GPU: by products and kernels in turn, or by one fused kernel.

A block of projected tokens stays in the GPU's L2 cache between the product that writes it and the kernel that reads
it. Results that blocks share are written in place, so that a block is no more launches than its products and its
kernels. Groups of tokens are not cut into blocks: their offsets lie on the GPU, and reading them would wait for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import projected
from .arguments import call
from .checks import accumulator
from .dispatch import choose
from .linear import linear

BLOCK_BYTES = 16 * 2**20  # of projected tokens: a third of the L2 cache of an H100
LEAST_ROWS = 1024  # of a product: fewer leave multiprocessors without work
FUSED = (
    "supports_fused_project_state",
    "fused_project_state",
    "supports_fused_folded_readout",
    "fused_folded_readout",
)  # operations that a library without CUDA lacks


def blocks(x, width):
    """Slices of samples, and for each the slices of tokens that are projected together: all, of several samples."""
    batch, tokens = x.shape[:2]
    rows = max(LEAST_ROWS, BLOCK_BYTES // (width * x.element_size()))
    samples = max(1, rows // max(1, tokens))
    for first in range(0, batch, samples):
        yield slice(first, first + samples), [slice(n, n + rows) for n in range(0, max(1, tokens), rows)]


def _rows(t):
    """Tokens (B, N, D) as a matrix; of a block of a dense tensor a view."""
    return t.reshape(-1, t.shape[-1])


def _project_to(out, x, projection):
    """out = x weightᵀ + bias, of tokens."""
    weight, bias = projection
    if bias is None:
        torch.mm(_rows(x), weight.t(), out=_rows(out))
    else:
        torch.addmm(bias, _rows(x), weight.t(), out=_rows(out))


def _block(args, samples, tokens):
    """The arguments for a block of the tokens."""
    names = [name for name in ("cos", "sin", "gate_cos", "gate_sin") if args.get(name) is not None]
    tables = {name: args[name][tokens] for name in names}
    weight = args.get("weight")
    return args | tables | {"weight": None if weight is None else weight[samples, tokens]}


def _samples(args, samples):
    """The state of some samples, or no state."""
    return {name: None if args[name] is None else args[name][samples] for name in ("total", "residual", "count")}


class _Gradients:
    """Gradients of a projection's weight and bias, each in one call for each block and kept in the accumulator's dtype.

    x: the tokens (B, N, D) that are projected. bias: may be None. cut: `blocks` as a list.
    """

    def __init__(self, x, bias, cut, needs_weight=True):
        self.like, self.bias, self.dtype = x, bias, accumulator(x.dtype)
        self.needs_weight, self.block = needs_weight, 0
        self.weight: Tensor | None = None
        if bias is not None:  # a row for each block
            count = sum(len(parts) for _, parts in cut)
            self.rows = x.new_empty(count, len(bias), dtype=self.dtype)

    def add(self, grad_y, x):
        if self.needs_weight:
            self._add_product(_rows(grad_y).t(), _rows(x))
        if self.bias is not None:
            torch.sum(_rows(grad_y), 0, dtype=self.dtype, out=self.rows[self.block])
        self.block += 1

    def _add_product(self, a, b):
        wider: dict[str, Any] = {"out_dtype": self.dtype} if a.is_cuda and a.dtype != self.dtype else {}
        if not a.is_cuda:  # only on GPUs may a product be of another dtype than its factors
            a, b = a.to(self.dtype), b.to(self.dtype)
        if self.weight is None:
            self.weight = torch.mm(a, b, **wider)
        else:
            torch.addmm(self.weight, a, b, **wider, out=self.weight)

    def sums(self):
        """Gradients of weight and bias in the dtype of the tokens; empty if not needed, or if there is no bias."""
        x = self.like
        weight = x.new_empty(0, x.shape[2]) if self.weight is None else self.weight.to(x.dtype)
        return weight, x.new_empty(0) if self.bias is None else self.rows.sum(0).to(x.dtype)


def project_state(args):
    taken, x = choose("project_state on a GPU", args), args["x"]
    nothing = x.new_empty(0, 0, 0)
    if taken == "fused kernel":
        return *call("fused_project_state", args), nothing, nothing, nothing
    if taken == "stored projection":
        return projected.project_state(args)
    projection = projected.context_projection(args)
    total = x.new_empty(len(x), 1, len(projection.weight), dtype=accumulator(x.dtype))
    count = x.new_empty(len(x), 1, dtype=torch.float64)
    state = {"total": total, "residual": torch.empty_like(total), "count": count}
    for samples, parts in blocks(x, len(projection.weight)):
        prior = {f"prior_{name}": value for name, value in _samples(args, samples).items()}
        for n in parts:
            first = n.start == 0
            block = _block(args, samples, n) | _samples(state, samples) | (prior if first else {})
            call("add_to_state", block, u=linear(x[samples, n], *projection), empty=first)
    return *state.values(), nothing, nothing, nothing


def project_state_backward(args):
    if choose("project_state_backward on a GPU", args) != "blocks of tokens":
        return projected.project_state_backward(args)
    x, grad_total, projection = args["x"], args["grad_total"], projected.context_projection(args)
    cut, grad_coeff = list(blocks(x, len(projection.weight))), None
    grad_x = x.new_empty(x.shape if args["needs_x"] else (0, 0, 0))
    grads = _Gradients(x, projection.bias, cut, args["needs_weight"])
    for samples, parts in cut:
        for n in parts:
            tokens, block = x[samples, n], _block(args, samples, n) | {"cumulative": False}
            u = linear(tokens, *projection)
            grad_u, grad_c = call("state_backward", block, grad_total=grad_total[samples], u=u)
            if args["needs_x"]:
                torch.mm(_rows(grad_u), projection.weight, out=_rows(grad_x[samples, n]))
            grads.add(grad_u, tokens)
            grad_coeff = grad_c if grad_coeff is None else grad_coeff.add_(grad_c)
    return grad_x, *grads.sums(), grad_coeff


def project_readout(args):
    if choose("project_readout on a GPU", args) != "blocks of tokens":
        return projected.project_readout(args)
    x, (gate_projection, out_projection) = args["x"], projected.readout_projections(args)
    y, nothing = x.new_empty(x.shape[0], x.shape[1], len(out_projection.weight)), x.new_empty(0, 0, 0)
    for samples, parts in blocks(x, args["total"].shape[2]):
        state = _samples(args, samples)
        for n in parts:
            gate = linear(x[samples, n], *gate_projection)
            mixed = projected.read(_block(args, samples, n) | state | {"offsets": None}, gate)
            _project_to(y[samples, n], mixed, out_projection)
    return y, nothing, nothing


def project_readout_backward(args):
    if choose("project_readout on a GPU", args) != "blocks of tokens":
        return projected.project_readout_backward(args)
    x, grad_y, (gate_projection, out_projection) = args["x"], args["grad_y"], projected.readout_projections(args)
    cut, total = list(blocks(x, args["total"].shape[2])), args["total"]
    grad_x, grad_total = x.new_empty(x.shape), total.new_empty(total.shape)
    of_gate, of_out = _Gradients(x, gate_projection.bias, cut), _Gradients(x, out_projection.bias, cut)
    for samples, parts in cut:
        state = _samples(args, samples)
        for n in parts:
            tokens, back = x[samples, n], grad_y[samples, n]
            block = _block(args, samples, n) | state | {"offsets": None}
            gate = linear(tokens, *gate_projection)
            mixed = projected.read(block, gate)
            grad_mixed = linear(back, out_projection.weight.t())
            grad_gate, grad_state = call("readout_backward", block, grad_y=grad_mixed, gate=gate)
            torch.mm(_rows(grad_gate), gate_projection.weight, out=_rows(grad_x[samples, n]))
            of_gate.add(grad_gate, tokens)
            of_out.add(back, mixed)
            grad_total[samples].copy_(grad_state) if n.start == 0 else grad_total[samples].add_(grad_state)
    return grad_x, *of_gate.sums(), grad_total, *of_out.sums()


def folded_readout(args):
    if choose("folded_readout on a GPU", args) == "fused kernel":
        return call("fused_folded_readout", args), args["x"].new_empty(0, 0, 0)
    return projected.folded_readout_decomposition(args)


_FUNCTIONS = (project_state, project_state_backward, project_readout, project_readout_backward, folded_readout)
IMPLEMENTATIONS = {function.__name__: function for function in _FUNCTIONS}


def register(library: torch.library.Library, by_name) -> None:
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, by_name(name, function), "CUDA")
