"""Operations that hold projections a block at a time: what they are made of, their derivatives, and their shapes.

The parts of an operation are the same function by operations that store the projections whole. They take over where
more than one gradient is asked for: a derivative of these then costs what it costs without blocks.
"""

import torch

from ._autograd import below_autograd, differentiable, has_tangent, made_of, needs_gradient
from ._derivatives import NO_PRIOR, STATE, prior_grads, with_moving_count
from .checks import FORMS, accumulator
from .state import State

ops = torch.ops.pom_ext
NO_TANGENTS = (None, None)


def linear(x, weight, bias):
    """(..., in) times (out, in)ᵀ plus (out,)."""
    return ops.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _linear_grads(x, weight, bias, grad_y, needs, names=("x", "weight", "bias")):
    """Gradients of `linear` by name, those that are needed."""
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    ways = (
        lambda: ops.linear(grad_rows, weight.t(), None).view(x.shape),
        lambda: ops.linear(grad_rows.t(), rows.t(), None),
        lambda: None if bias is None else grad_rows.sum(0, dtype=accumulator(x.dtype)).to(x.dtype),
    )
    return {name: way() for name, way in zip(names, ways) if name in needs}


def linear_vjp(x, needs, grad_y):
    return _linear_grads(x["x"], x["weight"], x["bias"], grad_y, needs)


def linear_jvp(x, t):
    if "x" in t and "weight" in t:  # both terms as one product, of twice the inputs
        rows, weight = torch.cat([t["x"], x["x"]], dim=1), torch.cat([x["weight"], t["weight"]], dim=1)
        return ops.linear(rows, weight, t.get("bias"))
    if "x" in t or "weight" in t:
        return ops.linear(t.get("x", x["x"]), t.get("weight", x["weight"]), t.get("bias"))
    return t["bias"].expand(len(x["x"]), -1)


def _one_by_one(operation):
    """The rule of torch.vmap: a call for each."""

    def rule(info, dims, *arguments):
        results = [
            operation(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])

    return rule


def _linear_batched(info, dims, x, weight, bias):
    """One product of more rows; or one each where the weights differ."""
    if dims[1:] != (None, None):
        return _one_by_one(ops.linear.default)(info, dims, x, weight, bias)
    rows = x.movedim(dims[0], 0)
    return ops.linear(rows.flatten(0, 1), weight, bias).unflatten(0, rows.shape[:2]), 0


def _directions(moving, still):
    """Tensors, the first of them tokens, and the directions that they move in: where one pass takes both, else None.

    It does on the CPU, where the tokens move, nothing of `still` does, and no gradient is to come. None stays None.
    """
    if moving[0].device.type != "cpu" or has_tangent(still):
        return None
    given, along = zip(*((None, None) if t is None else torch._VF._unpack_dual(t, level=0) for t in moving))
    if along[0] is None or needs_gradient((*moving, *along, *still)):
        return None
    moved = ((t, direction) for t, direction in zip(given, along))
    return given, [d if d is not None or t is None else torch.zeros_like(t) for t, d in moved]


def _dual(value, tangent):
    return torch._VF._make_dual(value, tangent, level=0)


def project_state(
    x, weight, bias, coeff, token_weight, offsets, cumulative, total, residual, count, cos, sin, axes, form, degree,
    keep=False,
):  # fmt: skip
    """The State, and of the operation the projections u that it is to keep for gradients, or nothing."""
    rest, angles = (weight, bias, coeff), (cos, sin, axes, form, degree)
    if (found := _directions((x, total, residual), rest)) is not None:
        (x, *prior), (along, *prior_along) = found
        context = token_weight, offsets, cumulative, *prior, count, *prior_along
        total, residual, count, *moved = below_autograd(ops.project_state_along, x, along, *rest, *context, *angles)
        return *map(_dual, (total, residual), moved), count, x.new_empty(0, 0, 0)
    u, prior = linear(x, weight, bias), (total, residual, count)
    state = ops.state(u, coeff, *NO_TANGENTS, token_weight, None, offsets, cumulative, *prior, *angles)
    return *state, x.new_empty(0, 0, 0)


def project_state_along(
    x, x_tangent, weight, bias, coeff, token_weight, offsets, cumulative, total, residual, count, total_tangent,
    residual_tangent, *angles,
):  # fmt: skip
    """The State, and its derivative along directions of x and of what came before."""
    groups = token_weight, None, offsets, cumulative
    u, along = linear(x, weight, bias), linear(x_tangent, weight, None)
    state = ops.state(u, coeff, *NO_TANGENTS, *groups, total, residual, count, *angles)
    still = None if coeff is None else torch.zeros_like(coeff)
    moved = total_tangent, residual_tangent, None if total_tangent is None else count
    return *state, *ops.state(u, coeff, along, still, *groups, *moved, *angles)[:2]


def project_state_backward(
    grad_total, x, weight, bias, coeff, token_weight, offsets, cumulative, cos, sin, axes, form, degree, kept, needs_x,
    needs_weight,
):  # fmt: skip
    u = linear(x, weight, bias)
    grad_u, grad_coeff = ops.state_backward(
        grad_total, u, coeff, *NO_TANGENTS, token_weight, None, offsets, cumulative, cos, sin, axes, form, degree
    )
    needs = {name for name, needed in (("x", needs_x), ("weight", needs_weight), ("bias", bias is not None)) if needed}
    grads = _linear_grads(x, weight, bias, grad_u, needs)
    nothing = _project_state_backward_fake(
        grad_total, x, weight, bias, coeff, token_weight, offsets, cumulative, cos, sin, axes, form, degree, kept,
        needs_x, needs_weight,
    )  # fmt: skip
    return *(grads.get(name, none) for name, none in zip(("x", "weight", "bias"), nothing)), grad_coeff


def _kept(x):
    """The arguments of the operation of the gradients, from those of the forward."""
    rest = {name: value for name, value in x.items() if name not in ("keep", "out")}
    return rest | {"kept": x["out"][0] if x["keep"] else None}


def _without_prior(x):
    return {name: value for name, value in x.items() if name not in NO_PRIOR}


def project_state_vjp(x, needs, grad_total, grad_residual, grad_count, grad_kept):
    # The residual is rounding error of the total: as a function of the inputs its derivative is zero.
    if grad_total is None:
        return {}
    names, found = ("x", "weight", "bias", "coeff"), prior_grads(grad_total) if needs.intersection(STATE) else {}
    if needs.isdisjoint(names):
        return found
    needed = {f"needs_{name}": name in needs for name in ("x", "weight")}
    grads = ops.project_state_backward(grad_total, **_kept(_without_prior(x)), **needed)
    return found | {name: grad for name, grad in zip(names, grads) if name in needs}


def project_readout(
    x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form, heads,
    keep=False,
):  # fmt: skip
    """What is read, projected, and of the operation the gates that it is to keep for gradients, or nothing."""
    weights = gate_weight, gate_bias, out_weight, out_bias
    if (found := _directions((x, total, residual), weights)) is not None:
        (x, total, residual), along = found
        given = *along, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias
        y, moved = below_autograd(ops.project_readout_along, *given, offsets, cos, sin, axes, form, heads)
        return _dual(y, moved), x.new_empty(0, 0, 0)
    gate = linear(x, gate_weight, gate_bias)
    mixed = ops.readout(gate, None, total, residual, *NO_TANGENTS, count, offsets, cos, sin, axes, form, heads)
    return linear(mixed, out_weight, out_bias), x.new_empty(0, 0, 0)


def project_readout_along(
    x_tangent, total_tangent, residual_tangent, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias,
    *rest,
):  # fmt: skip
    """The same, and its derivative along directions of x and of the state."""
    gate, along = linear(x, gate_weight, gate_bias), linear(x_tangent, gate_weight, None)
    mixed = ops.readout(gate, None, total, residual, *NO_TANGENTS, count, *rest)
    moved = ops.readout(gate, along, total, residual, total_tangent, residual_tangent, count, *rest)
    return linear(mixed, out_weight, out_bias), linear(moved, out_weight, None)


def project_readout_backward(
    grad_y, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form, heads,
    kept,
):  # fmt: skip
    gate = linear(x, gate_weight, gate_bias)
    mixed = ops.readout(gate, None, total, residual, *NO_TANGENTS, count, offsets, cos, sin, axes, form, heads)
    needs = {"x", "weight", "bias"}
    out = _linear_grads(mixed, out_weight, out_bias, grad_y, needs)
    grad_gate, grad_total = ops.readout_backward(
        out["x"], gate, None, total, residual, count, offsets, cos, sin, axes, form, heads
    )
    grads = _linear_grads(x, gate_weight, gate_bias, grad_gate, needs)
    nothing = x.new_empty(0)
    return (
        grads["x"],
        grads["weight"],
        nothing if gate_bias is None else grads["bias"],
        grad_total,
        out["weight"],
        nothing if out_bias is None else out["bias"],
    )


def project_readout_vjp(x, needs, grad_y, grad_kept):
    if grad_y is None:
        return {}
    names = ("x", "gate_weight", "gate_bias", "total", "out_weight", "out_bias")
    grads = dict(zip(names, ops.project_readout_backward(grad_y, **_kept(x))))
    grads["residual"] = grads["total"]
    return {name: grad for name, grad in grads.items() if name in needs}


def fold(total, residual, count, weight, heads):
    """(B, G, heads, D): the mean features of every head through its columns of a weight (D, C)."""
    batch, groups, channels = total.shape
    # On a processor without products of 16-bit numbers torch takes them one by one.
    dtype = accumulator(weight.dtype) if weight.device.type == "cpu" else weight.dtype
    mean = State(total, residual, count).mean().to(dtype).reshape(batch * groups, heads, channels // heads)
    of_heads = mean.transpose(0, 1) @ weight.to(dtype).unflatten(1, (heads, -1)).permute(1, 2, 0)
    return of_heads.transpose(0, 1).reshape(batch, groups, heads, len(weight)).to(weight.dtype)


def folded_readout(
    x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form
):
    """y_m = Σ_h γ(g)_mh folded[group of m, h] + bias, of folded (B, G, heads, D)."""
    weights = gate_weight, gate_bias, out_weight, out_bias
    if (found := _directions((x, total, residual), weights)) is not None:
        (x, total, residual), along = found
        given = *along, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias
        return _dual(*below_autograd(ops.folded_readout_along, *given, offsets, cos, sin, axes, form))
    folded = fold(total, residual, count, out_weight, len(gate_weight))
    gate = linear(x, gate_weight, gate_bias)
    return multiply_folded(gate_values(gate, None, cos, sin, axes, form), folded, out_bias, offsets)


def folded_readout_along(
    x_tangent, total_tangent, residual_tangent, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias,
    offsets, *rest,
):  # fmt: skip
    """The same, and its derivative along directions of x and of the state."""
    heads = len(gate_weight)
    folded = fold(total, residual, count, out_weight, heads)
    folded_along = fold(total_tangent, residual_tangent, count, out_weight, heads)
    gate, gate_along = linear(x, gate_weight, gate_bias), linear(x_tangent, gate_weight, None)
    value, value_along = gate_values(gate, None, *rest), gate_values(gate, gate_along, *rest)
    along = multiply_folded(value, folded_along, None, offsets) + multiply_folded(value_along, folded, None, offsets)
    return multiply_folded(value, folded, out_bias, offsets), along


def gate_values(gate, along, cos, sin, axes, form):
    """γ (B, M, heads) of gates, or its derivative along a direction of them: what they read of a state of ones."""
    batch, _, heads = gate.shape
    one = gate.new_ones(batch, 1, heads, dtype=accumulator(gate.dtype))
    count = gate.new_ones(batch, 1, dtype=torch.float64)
    return ops.readout(gate, along, one, torch.zeros_like(one), *NO_TANGENTS, count, None, cos, sin, axes, form, 1)


def multiply_folded(value, folded, bias, offsets):
    """Values (B, M, heads) times what is folded for their groups (B, G, heads, D), plus (D,)."""
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


def _linear_fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _project_state_fake(x, weight, bias, coeff, token_weight, offsets, *rest):
    groups = 1 if offsets is None else offsets.shape[0] - 1
    total = x.new_empty(x.shape[0], groups, weight.shape[0], dtype=accumulator(x.dtype))
    kept = (*x.shape[:2], weight.shape[0]) if rest[-1] else (0, 0, 0)
    count = x.new_empty(x.shape[0], groups, dtype=torch.float64)
    return total, torch.empty_like(total), count, x.new_empty(kept)


def _project_state_along_fake(x, x_tangent, *rest):
    total, residual, count, _ = _project_state_fake(x, *rest, False)
    return total, residual, count, torch.empty_like(total), torch.empty_like(total)


def _project_state_backward_fake(grad_total, x, weight, bias, coeff, *rest):
    form, degree, _, needs_x, needs_weight = rest[-5:]
    power = form == FORMS.index("power")
    return (
        x.new_empty(x.shape if needs_x else (0, 0, 0)),
        x.new_empty(weight.shape if needs_weight else (0, x.shape[2])),
        x.new_empty(0 if bias is None else bias.shape),
        x.new_empty((weight.shape[0], degree) if power else (0, 0), dtype=accumulator(x.dtype)),
    )


def _project_readout_fake(x, gate_weight, gate_bias, total, residual, count, out_weight, *rest):
    kept = (*x.shape[:2], gate_weight.shape[0]) if rest[-1] else (0, 0, 0)
    return x.new_empty(x.shape[0], x.shape[1], out_weight.shape[0]), x.new_empty(kept)


def _folded_readout_fake(x, gate_weight, gate_bias, total, residual, count, out_weight, *rest):
    return x.new_empty(x.shape[0], x.shape[1], out_weight.shape[0])


def _readout_along_fake(x_tangent, total_tangent, residual_tangent, *arguments):
    return tuple(_folded_readout_fake(*arguments) for _ in range(2))


def _project_readout_backward_fake(
    grad_y, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, *rest
):
    grads = (x, gate_weight, gate_bias, total, out_weight, out_bias)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in grads)


def register(library):
    torch.library.register_fake("pom_ext::linear", _linear_fake)
    torch.library.register_vmap("pom_ext::linear", _linear_batched)
    differentiable(library, ops.linear.default, linear_vjp, linear_jvp)
    for parts, fake in (
        (project_state, _project_state_fake),
        (project_state_along, _project_state_along_fake),
        (project_state_backward, _project_state_backward_fake),
        (project_readout, _project_readout_fake),
        (project_readout_backward, _project_readout_backward_fake),
        (project_readout_along, _readout_along_fake),
        (folded_readout, _folded_readout_fake),
        (folded_readout_along, _readout_along_fake),
    ):
        torch.library.register_fake(f"pom_ext::{parts.__name__}", fake)
        operation = getattr(ops, parts.__name__).default
        torch.library.register_vmap(f"pom_ext::{parts.__name__}", _one_by_one(operation))
    differentiable(
        library, ops.project_state.default, project_state_vjp, parts=project_state, keeps=1, forgets=NO_PRIOR,
        instead=with_moving_count(ops.project_state.default),
    )  # fmt: skip
    differentiable(library, ops.project_readout.default, project_readout_vjp, parts=project_readout, keeps=1)
    for parts in (
        project_state_along, project_state_backward, project_readout_along, project_readout_backward, folded_readout,
        folded_readout_along,
    ):  # fmt: skip
        made_of(library, getattr(ops, parts.__name__).default, parts)
