"""What torch knows of the compiled operations beside their kernels: shapes of the results, derivatives, batches.

Gradients are registered operations too, so that traced graphs contain them. They save inputs and the state alone;
features are computed again.
"""

import torch

from ..ops import _blocks, _projections
from ..ops import _derivatives as derivatives
from ._autograd import differentiable, refuse_derivatives
from .checks import FORMS, accumulator


def _new_state(u, groups):
    dtype = accumulator(u.dtype)
    total = u.new_empty(u.shape[0], groups, u.shape[2], dtype=dtype)
    return total, torch.empty_like(total), u.new_empty(u.shape[0], groups, dtype=torch.float64)


def _new_coeff_grad(u, form, degree):
    return u.new_empty(*((u.shape[2], degree) if form == FORMS.index("power") else (0, 0)), dtype=accumulator(u.dtype))


def _contiguous_like(t):
    return t.new_empty(t.shape)


def _state_fake(u, coeff, u_tangent, coeff_tangent, weight, mask, offsets, *rest):
    groups = mask.shape[1] if mask is not None else offsets.shape[0] - 1 if offsets is not None else 1
    return _new_state(u, groups)


def _state_backward_fake(grad_total, u, *rest):
    form, degree = rest[-2:]
    return _contiguous_like(u), _new_coeff_grad(u, form, degree)


def _readout_fake(gate, gate_tangent, total, *rest):
    return gate.new_empty(gate.shape[0], gate.shape[1], total.shape[2])


def _readout_backward_fake(grad_y, gate, gate_tangent, total, *rest):
    return _contiguous_like(gate), _contiguous_like(total)


def _causal_mix_fake(u, gate, *rest):
    return (gate.new_empty(u.shape), *_new_state(u, 1))


def _causal_mix_backward_fake(grad_y, grad_total, u, gate, *rest):
    form, degree = rest[-3:-1]
    grads = _contiguous_like(u), _contiguous_like(gate), _new_coeff_grad(u, form, degree)
    return (*grads, u.new_empty(u.shape[0], 1, u.shape[2], dtype=accumulator(u.dtype)))


def _mix_fake(u, gate, *rest):
    return (gate.new_empty(gate.shape[0], gate.shape[1], u.shape[2]), *_new_state(u, 1))


def _update_fake(u, gate, *rest):
    return gate.new_empty(gate.shape[0], gate.shape[1], u.shape[2])


def _add_to_state_fake(u, *rest):
    return None


# Arguments whose first dimension is the batch; the others belong to all samples.
_OF_SAMPLES = {
    "u", "gate", "u_tangent", "gate_tangent", "weight", "mask", "total", "residual", "total_tangent",
    "residual_tangent", "count", "grad_y", "grad_total",
}  # fmt: skip


def _batched(operation, repeated=()):
    """The rule of torch.vmap: one call of more samples; or one call each where something of all samples differs.

    repeated: small arguments of samples, which are repeated where all share them.
    """
    names = [argument.name for argument in operation._schema.arguments]
    sums_samples = any(result.name == "grad_coeff" for result in operation._schema.returns)

    def rule(info, dims, *arguments):
        moved = {
            name: value if dim is None else value.movedim(dim, 0) for name, value, dim in zip(names, arguments, dims)
        }
        given = {name for name, dim in zip(names, dims) if dim is not None}
        tensors = {name for name in names if isinstance(moved[name], torch.Tensor)}
        shared = tensors.intersection(repeated) - given
        if shared and given | shared == tensors & _OF_SAMPLES:
            moved |= {name: moved[name].expand(info.batch_size, *moved[name].shape) for name in shared}
            given |= shared
        if given == tensors & _OF_SAMPLES and not (sums_samples and moved["coeff"] is not None):
            results = operation(*(moved[name].flatten(0, 1) if name in given else moved[name] for name in names))
            split = lambda t: (
                t.unflatten(0, (info.batch_size, -1)) if t.shape[0] else t.new_empty(info.batch_size, *t.shape)
            )
            results = tuple(map(split, results)) if isinstance(results, tuple) else split(results)
        else:
            each = [
                operation(*(moved[name][i] if name in given else moved[name] for name in names))
                for i in range(info.batch_size)
            ]
            results = tuple(map(torch.stack, zip(*each))) if isinstance(each[0], tuple) else torch.stack(each)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return rule


# Kept as long as the module: what is registered with it goes when it goes.
_LIBRARY = torch.library.Library("pom_ext", "FRAGMENT")


# What to say where an operation in place is asked for a derivative.
_IN_PLACE = {
    "update": "an update in place has no derivative; use polynomial_mix",
    "add_to_state": "adding to a state in place has no derivative; use polynomial_state with state=",
}


def register():
    for name, fake in {
        "state": _state_fake,
        "state_backward": _state_backward_fake,
        "readout": _readout_fake,
        "readout_backward": _readout_backward_fake,
        "causal_mix": _causal_mix_fake,
        "causal_mix_backward": _causal_mix_backward_fake,
        "mix": _mix_fake,
        "update": _update_fake,
        "add_to_state": _add_to_state_fake,
    }.items():
        torch.library.register_fake(f"pom_ext::{name}", fake)
        operation = getattr(torch.ops.pom_ext, name).default
        if name in _IN_PLACE:
            refuse_derivatives(_LIBRARY, operation, f"pom_ext: {_IN_PLACE[name]}")
            continue
        batched = _batched(operation, derivatives.NO_PRIOR if name == "state" else ())
        torch.library.register_vmap(f"pom_ext::{name}", batched)
        vjp, jvp = getattr(derivatives, f"{name}_vjp"), getattr(derivatives, f"{name}_jvp")
        options = {"keeps": 3} if name == "mix" else {}
        if name == "state":
            options = {"forgets": derivatives.NO_PRIOR, "instead": derivatives.with_moving_count(operation)}
        differentiable(_LIBRARY, operation, vjp, jvp, **options)
    _projections.register(_LIBRARY)
    _blocks.register(_LIBRARY)
