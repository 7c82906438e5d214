"""Operations that project tokens and mix them, without storing the projections.

The state is only summed, so projected tokens are held a block at a time and never all of them; with one gate per head
the readout is folded into the output projection, which then need not run over tokens.

The decomposition of an operation computes the same result with operations that store the projection. It takes over if
more than one derivative is needed: that then costs as much as without blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _autograd as autograd
from ._derivatives import NO_PRIOR, NO_STATE_TANGENT, STATE, merge_prior, prior_grads
from .arguments import Gate, Polynomial, Projection, Visibility, call
from .checks import FORMS, accumulator
from .linear import all_unmodified, batched_one_by_one, cast, linear, linear_grads, project, projection_arguments
from .state import State

TANGENTS = ("x_tangent", "total_tangent", "residual_tangent")


def projected_state(
    x: Tensor,
    projection: nn.Module,
    polynomial: Polynomial,
    visibility: Visibility,
    prior: State | None = None,
    save_projection: bool = False,
) -> State:
    """`polynomial_state` of projection(x), an unmodified nn.Linear, without storing it.

    Args:
        x: (B, N, D) context tokens.
        prior: State (B, 1, C) of earlier tokens, checked.
        save_projection: store it after all, for the gradients, which otherwise project again.
    """
    x, matrix = projection_arguments(x, projection)
    arguments = matrix.to_kernel("context") | polynomial.to_kernel(x.dtype) | visibility.to_kernel()
    before = {} if prior is None else prior.to_kernel()
    return State(*call("project_state", arguments, before, x=x, save_projection=save_projection)[:3])


def projected_readout(
    x: Tensor,
    projections: tuple[nn.Module, nn.Module],
    state: State,
    gate: Gate,
    form: str,
    offsets: Tensor | None,
    save_projection: bool = False,
) -> Tensor:
    """(B, M, D): out(polynomial_readout(gate(x), state)) of two unmodified nn.Linear, a block of tokens at a time.

    Args:
        x: (B, M, D) query tokens.
        projections: that of the gates and that of the output.
        gate: heads and angles; its values are those that the projection makes of x.
        offsets: the queries of every group, see `query_offsets`.
        save_projection: store the gates for the gradients, which otherwise project again.
    """
    x, gate_projection, out_projection = projection_arguments(x, *projections)
    arguments = gate_projection.to_kernel("gate") | out_projection.to_kernel("out") | gate.to_kernel()
    more = {"form": FORMS.index(form), "offsets": offsets, "save_projection": save_projection}
    return call("project_readout", arguments, state.to_kernel(), more, x=x)[0]


def folded_readout(
    x: Tensor,
    projections: tuple[nn.Module, nn.Module],
    state: State,
    gate: Gate,
    form: str,
    offsets: Tensor | None,
) -> Tensor:
    """The readout with one gate per head, and the mean features of a head folded into the output projection:

        y_m = Σ_h γ(g)_mh (W_o[:, h] H[h]) + b_o

    Arguments and result as of `projected_readout`.
    """
    arguments = gate.to_kernel() | state.to_kernel() | {"form": FORMS.index(form), "offsets": offsets}
    # On a GPU gradients come from torch's own products.
    if (x.device.type == "cpu" or not torch.is_grad_enabled()) and all_unmodified(x, projections[0]):
        x, gate_projection, out_projection = projection_arguments(x, *projections)
        parameters = gate_projection.to_kernel("gate") | out_projection.to_kernel("out")
        return call("folded_readout", arguments, parameters, x=x)[0]
    out: Any = projections[1]
    weight, bias = cast(out.weight, out.bias)
    values = gate_values(arguments, project(projections[0], x))
    return multiply_folded(values, fold(state, weight, gate.n_heads), bias, offsets)


def context_projection(args):
    return Projection(args["context_weight"], args["context_bias"])


def readout_projections(args):
    return Projection(args["gate_weight"], args["gate_bias"]), Projection(args["out_weight"], args["out_bias"])


def _one_pass(operation, args, constants):
    """The results of a call with tangents of x and the state, as dual tensors, or None.

    On the CPU one pass over the tokens computes value and tangent, if x has a tangent, the arguments named in
    `constants` have none, and no gradient is needed.
    """
    if args["x_tangent"] is not None or args["x"].device.type != "cpu":
        return None
    fixed = [args[name] for name in constants]
    if autograd.has_tangent(fixed):
        return None
    pairs = [autograd.primal_and_tangent(args[name]) for name in ("x", *STATE)]
    primals, tangents = zip(*pairs, strict=True)
    if tangents[0] is None or autograd.needs_gradient((*primals, *tangents, *fixed)):
        return None
    tangents = [t if t is not None or p is None else torch.zeros_like(p) for p, t in pairs]
    replaced: dict[str, Tensor | None] = dict(zip(("x", *STATE, *TANGENTS), (*primals, *tangents), strict=True))
    with autograd.below_autograd():
        return call(operation, args, replaced, save_projection=False)


def project_state(args):
    """The decomposition of project_state."""
    x, nothing = args["x"], args["x"].new_empty(0, 0, 0)
    constants = ("context_weight", "context_bias", "coeff")
    if (results := _one_pass("project_state", args, constants)) is not None:
        total, residual, count, *tangents, _ = results
        return *map(autograd.make_dual, (total, residual), tangents), count, nothing, nothing, nothing
    weight, bias = context_projection(args)
    u = linear(x, weight, bias)
    state = call("state", args, u=u)
    if args["x_tangent"] is None:
        return *state, nothing, nothing, nothing
    total, residual, coeff = args["total_tangent"], args["residual_tangent"], args["coeff"]
    prior = {"total": total, "residual": residual, "count": None if total is None else args["count"]}
    zeros = None if coeff is None else torch.zeros_like(coeff)
    tangent = {"u_tangent": linear(args["x_tangent"], weight), "coeff_tangent": zeros}
    return *state, *call("state", args, prior, tangent, u=u)[:2], nothing


def project_state_backward(args):
    """The decomposition of project_state_backward."""
    projection = context_projection(args)
    u = linear(args["x"], *projection)
    grad_u, grad_coeff = call("state_backward", args, u=u)
    needs = (("x", args["needs_x"]), ("weight", args["needs_weight"]), ("bias", projection.bias is not None))
    grads = linear_grads(args["x"], projection, grad_u, {name for name, needed in needs if needed})
    empty = project_state_backward_fake(args)
    return *(grads.get(name, none) for name, none in zip(("x", "weight", "bias"), empty)), grad_coeff


def _backward_arguments(args):
    """The arguments of the backward operation, from those of the forward and its saved results."""
    return args | {"saved_projection": args["out"][0] if args["save_projection"] else None}


def project_state_vjp(args, needed, grad_total, *_):
    # The residual is rounding error of the total: as a function of the inputs its derivative is zero.
    if grad_total is None:
        return {}
    names = ("x", "context_weight", "context_bias", "coeff")
    grads = prior_grads(grad_total) if needed.intersection(STATE) else {}
    if needed.isdisjoint(names):
        return grads
    needs = {"needs_x": "x" in needed, "needs_weight": "context_weight" in needed}
    found = call("project_state_backward", _backward_arguments(args), needs, grad_total=grad_total)
    return grads | {name: grad for name, grad in zip(names, found) if name in needed}


def read(args, gate, **tangents):
    """The readout of gates; args["total_tangent"] and the like count only if they are given as `tangents` too."""
    return call("readout", args, NO_STATE_TANGENT, tangents, gate=gate)


def project_readout(args):
    """The decomposition of project_readout."""
    x, nothing = args["x"], args["x"].new_empty(0, 0, 0)
    constants = ("gate_weight", "gate_bias", "out_weight", "out_bias")
    if (results := _one_pass("project_readout", args, constants)) is not None:
        return autograd.make_dual(*results[:2]), nothing, nothing
    gate = linear(x, args["gate_weight"], args["gate_bias"])
    y = linear(read(args, gate), args["out_weight"], args["out_bias"])
    if args["x_tangent"] is None:
        return y, nothing, nothing
    state = {name: args[name] for name in TANGENTS[1:]}
    mixed = read(args, gate, gate_tangent=linear(args["x_tangent"], args["gate_weight"]), **state)
    return y, linear(mixed, args["out_weight"]), nothing


def project_readout_backward(args):
    """The decomposition of project_readout_backward."""
    gate_projection, out_projection = readout_projections(args)
    gate = linear(args["x"], *gate_projection)
    needed = {"x", "weight", "bias"}
    out = linear_grads(read(args, gate), out_projection, args["grad_y"], needed)
    grad_gate, grad_total = call("readout_backward", args, grad_y=out["x"], gate=gate)
    grads = linear_grads(args["x"], gate_projection, grad_gate, needed)
    nothing = args["x"].new_empty(0)
    gate_bias, out_bias = (nothing if bias is None else bias for bias in (grads["bias"], out["bias"]))
    return grads["x"], grads["weight"], gate_bias, grad_total, out["weight"], out_bias


def project_readout_vjp(args, needed, grad_y, *_):
    if grad_y is None:
        return {}
    names = ("x", "gate_weight", "gate_bias", "total", "out_weight", "out_bias")
    found = call("project_readout_backward", _backward_arguments(args), grad_y=grad_y)
    grads = dict(zip(names, found)) | {"residual": found[names.index("total")]}
    return {name: grad for name, grad in grads.items() if name in needed}


def fold(state: State, weight: Tensor, heads: int) -> Tensor:
    """(B, G, heads, D): the mean features of every head through its columns of a weight (D, C)."""
    batch, groups, channels = state.total.shape
    # On a processor without products of 16-bit numbers torch takes them one by one.
    dtype = accumulator(weight.dtype) if weight.device.type == "cpu" else weight.dtype
    mean = state.mean().to(dtype).reshape(batch * groups, heads, channels // heads)
    of_heads = mean.transpose(0, 1) @ weight.to(dtype).unflatten(1, (heads, -1)).permute(1, 2, 0)
    return of_heads.transpose(0, 1).reshape(batch, groups, heads, len(weight)).to(weight.dtype)


def gate_values(args, gate: Tensor, gate_tangent: Tensor | None = None) -> Tensor:
    """γ (B, M, heads) of gates, or its tangent: the readout of a state of ones."""
    batch, _, heads = gate.shape
    one = gate.new_ones(batch, 1, heads, dtype=accumulator(gate.dtype))
    ones = {"total": one, "residual": torch.zeros_like(one), "count": gate.new_ones(batch, 1, dtype=torch.float64)}
    return read(args | ones | {"offsets": None, "heads": 1}, gate, gate_tangent=gate_tangent)


def multiply_folded(value: Tensor, folded: Tensor, bias: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Values (B, M, heads) times the folded projection of their groups (B, G, heads, D), plus (D,)."""
    batch, groups, heads, dim = folded.shape
    if groups == 1:
        return _product(value, folded[:, 0], bias)
    if offsets is None:
        even = value.reshape(batch * groups, value.shape[1] // groups, heads)
        return _product(even, folded.flatten(0, 1), bias).reshape(batch, value.shape[1], dim)
    # A token's gates stand in the columns of its group, zeros in the others.
    group = torch.searchsorted(offsets[1:], torch.arange(value.shape[1], device=value.device), right=True)
    own = group[:, None] == torch.arange(groups, device=value.device)  # (M, G)
    spread = torch.where(own[..., None], value[:, :, None], 0)  # (B, M, G, heads)
    return _product(spread.flatten(2), folded.flatten(1, 2), bias)


def _product(value, folded, bias):
    """(B, M, heads) times (B, heads, D), plus (D,)."""
    if value.shape[0] == 1 and value.device.type == "cpu":
        return linear(value[0], folded[0].t(), bias)[None]
    return value @ folded if bias is None else torch.baddbmm(bias, value, folded)


def folded_readout_decomposition(args):
    x, bias, offsets = args["x"], args["out_bias"], args["offsets"]
    nothing = x.new_empty(0, 0, 0)
    constants = ("gate_weight", "gate_bias", "out_weight", "out_bias")
    if (results := _one_pass("folded_readout", args, constants)) is not None:
        return autograd.make_dual(*results), nothing
    heads = len(args["gate_weight"])
    folded = fold(State(args["total"], args["residual"], args["count"]), args["out_weight"], heads)
    gate = linear(x, args["gate_weight"], args["gate_bias"])
    value = gate_values(args, gate)
    y = multiply_folded(value, folded, bias, offsets)
    if args["x_tangent"] is None:
        return y, nothing
    state_tangent = State(args["total_tangent"], args["residual_tangent"], args["count"])
    folded_tangent = fold(state_tangent, args["out_weight"], heads)
    value_tangent = gate_values(args, gate, linear(args["x_tangent"], args["gate_weight"]))
    tangent = multiply_folded(value, folded_tangent, None, offsets)
    return y, tangent + multiply_folded(value_tangent, folded, None, offsets)


def project_state_fake(args):
    x, width = args["x"], args["context_weight"].shape[0]
    groups = 1 if args["offsets"] is None else args["offsets"].shape[0] - 1
    total = x.new_empty(x.shape[0], groups, width, dtype=accumulator(x.dtype))
    tangent = total.new_empty((0, 0, 0) if args["x_tangent"] is None else total.shape)
    saved = x.new_empty((*x.shape[:2], width) if args["save_projection"] else (0, 0, 0))
    count = x.new_empty(x.shape[0], groups, dtype=torch.float64)
    return total, torch.empty_like(total), count, tangent, torch.empty_like(tangent), saved


def project_state_backward_fake(args):
    x, weight, bias = args["x"], args["context_weight"], args["context_bias"]
    power = args["form"] == FORMS.index("power")
    return (
        x.new_empty(x.shape if args["needs_x"] else (0, 0, 0)),
        x.new_empty(weight.shape if args["needs_weight"] else (0, x.shape[2])),
        x.new_empty(0 if bias is None else bias.shape),
        x.new_empty((weight.shape[0], args["degree"]) if power else (0, 0), dtype=accumulator(x.dtype)),
    )


def project_readout_fake(args):
    x = args["x"]
    saved = (*x.shape[:2], args["gate_weight"].shape[0]) if args["save_projection"] else (0, 0, 0)
    return *folded_readout_fake(args), x.new_empty(saved)


def folded_readout_fake(args):
    x = args["x"]
    y = x.new_empty(x.shape[0], x.shape[1], args["out_weight"].shape[0])
    return y, x.new_empty((0, 0, 0) if args["x_tangent"] is None else y.shape)


def project_readout_backward_fake(args):
    names = ("x", "gate_weight", "gate_bias", "total", "out_weight", "out_bias")
    grads = (args[name] for name in names)
    return tuple(args["x"].new_empty(0) if t is None else t.new_empty(t.shape) for t in grads)


DECOMPOSITIONS = {
    "project_state": (project_state, project_state_fake),
    "project_state_backward": (project_state_backward, project_state_backward_fake),
    "project_readout": (project_readout, project_readout_fake),
    "project_readout_backward": (project_readout_backward, project_readout_backward_fake),
    "folded_readout": (folded_readout_decomposition, folded_readout_fake),
}


def register(library: torch.library.Library, by_name) -> None:
    """Register shapes, batches and derivatives. by_name(name, function): function(args) as a function of positions."""
    for name, (decomposition, fake) in DECOMPOSITIONS.items():
        torch.library.register_fake(f"pom_ext::{name}", by_name(name, fake))
        torch.library.register_vmap(f"pom_ext::{name}", batched_one_by_one(name))
        if name not in ("project_state", "project_readout"):
            autograd.register_decomposition(library, name, decomposition)
    prior: dict[str, Any] = {"unread": NO_PRIOR, "with_count": merge_prior("project_state")}
    for name, vjp, more in (("project_state", project_state_vjp, prior), ("project_readout", project_readout_vjp, {})):
        autograd.differentiable(library, name, vjp, decomposition=DECOMPOSITIONS[name][0], saved_results=1, **more)
