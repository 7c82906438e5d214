"""What torch knows of the compiled operations beside their kernels: shapes of the results, derivatives, batches.

Gradients are registered operations too, so that traced graphs contain them. They save inputs and the state alone;
features are computed again.
"""

import torch

from . import _derivatives as derivatives
from . import linear, projected, projected_cuda
from ._autograd import differentiable, refuse_derivatives
from .arguments import OPERATIONS, describe
from .checks import FORMS, accumulator

# Kept as long as the module: torch forgets registrations when their library is deleted.
_LIBRARY = torch.library.Library("pom_ext", "FRAGMENT")

# The errors of operations in place if a derivative is needed.
IN_PLACE = {
    "update": "an update in place has no derivative; use polynomial_mix",
    "add_to_state": "adding to a state in place has no derivative; use polynomial_state with state=",
}
# Arguments whose first dimension is the batch; the others belong to all samples.
OF_SAMPLES = {
    *("u", "gate", "u_tangent", "gate_tangent", "weight", "mask", "count", "grad_y", "grad_total"),
    *("total", "residual", "total_tangent", "residual_tangent"),
}


def _new_state(u, groups=1):
    total = u.new_empty(u.shape[0], groups, u.shape[2], dtype=accumulator(u.dtype))
    return total, torch.empty_like(total), u.new_empty(u.shape[0], groups, dtype=torch.float64)


def _new_y(args):
    gate = args["gate"]
    width = args["u"].shape[2] if "u" in args else args["total"].shape[2]
    return gate.new_empty(gate.shape[0], gate.shape[1], width)


def _contiguous_like(t):
    return t.new_empty(t.shape)


def _new_coeff_grad(args):
    u, power = args["u"], args["form"] == FORMS.index("power")
    return u.new_empty(*((u.shape[2], args["degree"]) if power else (0, 0)), dtype=accumulator(u.dtype))


def _causal_mix_backward_fake(args):
    u = args["u"]
    grads = _contiguous_like(u), _contiguous_like(args["gate"]), _new_coeff_grad(args)
    return *grads, u.new_empty(u.shape[0], 1, u.shape[2], dtype=accumulator(u.dtype))


FAKES = {
    "state": lambda args: _new_state(args["u"], derivatives.group_count(args)),
    "state_backward": lambda args: (_contiguous_like(args["u"]), _new_coeff_grad(args)),
    "readout": _new_y,
    "readout_backward": lambda args: (_contiguous_like(args["gate"]), _contiguous_like(args["total"])),
    "mix": lambda args: (_new_y(args), *_new_state(args["u"])),
    "causal_mix": lambda args: (_new_y(args), *_new_state(args["u"])),
    "causal_mix_backward": _causal_mix_backward_fake,
    "update": _new_y,
    "add_to_state": lambda args: None,
}


def by_name(operation, function):
    """function(args), of the arguments by name, as the function of positions that torch calls."""
    names = list(OPERATIONS[operation].defaults)
    return lambda *values: function(dict(zip(names, values, strict=True)))


def _batched(name, repeated=()):
    """The rule of torch.vmap: one call of more samples; or a call for each if arguments of all samples differ.

    repeated: small arguments of samples, which are repeated if all samples share them.
    """
    operation, defaults = OPERATIONS[name]
    names = list(defaults)
    sums_samples = any(result.name == "grad_coeff" for result in operation._schema.returns)

    def rule(info, dims, *values):
        moved = [value if dim is None else value.movedim(dim, 0) for value, dim in zip(values, dims, strict=True)]
        args = dict(zip(names, moved, strict=True))
        batched = {name for name, dim in zip(names, dims, strict=True) if dim is not None}
        tensors = {name for name in names if isinstance(args[name], torch.Tensor)}
        shared = tensors.intersection(repeated) - batched
        if shared and batched | shared == tensors & OF_SAMPLES:
            args |= {name: args[name].expand(info.batch_size, *args[name].shape) for name in shared}
            batched |= shared
        if batched == tensors & OF_SAMPLES and not (sums_samples and args["coeff"] is not None):
            results = operation(*(args[name].flatten(0, 1) if name in batched else args[name] for name in names))
            split = lambda t: (
                t.unflatten(0, (info.batch_size, -1)) if t.shape[0] else t.new_empty(info.batch_size, *t.shape)
            )
            results = tuple(map(split, results)) if isinstance(results, tuple) else split(results)
            return results, (0,) * len(results) if isinstance(results, tuple) else 0
        return linear.batched_one_by_one(name)(info, dims, *values)

    return rule


def register():
    """Describe every operation to torch and to `arguments.call`.

    Raises:
        AttributeError, KeyError, RuntimeError: the compiled library has other operations, or with other arguments.
    """
    for name in (*FAKES, "linear", *projected.DECOMPOSITIONS, *projected_cuda.FUSED):
        describe(name)
    for name, fake in FAKES.items():
        torch.library.register_fake(f"pom_ext::{name}", by_name(name, fake))
        if name in IN_PLACE:
            refuse_derivatives(_LIBRARY, name, f"pom_ext: {IN_PLACE[name]}")
            continue
        prior = derivatives.NO_PRIOR if name == "state" else ()
        with_count = derivatives.merge_prior(name) if name == "state" else None
        vjp, jvp = (getattr(derivatives, f"{name}_{kind}") for kind in ("vjp", "jvp"))
        torch.library.register_vmap(f"pom_ext::{name}", _batched(name, prior))
        saved = 3 if name == "mix" else 0
        differentiable(_LIBRARY, name, vjp, jvp, saved_results=saved, unread=prior, with_count=with_count)
    linear.register(_LIBRARY)
    projected.register(_LIBRARY, by_name)
    projected_cuda.register(_LIBRARY, by_name)
