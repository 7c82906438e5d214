"""Derivatives of registered operations, backward and forward, as their kernel for torch's dispatch key Autograd.

`torch.library.register_autograd` knows the backward only: it drops the tangent of an argument without an error. An
`autograd.Function` with a `jvp` knows both, but `torch.compile(fullgraph=True)` refuses it. Here the Function lives
inside the operation: the compiler sees an operation, and torch.func calls it once for each of its levels.

All use of torch's private interfaces for derivatives is in this file.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .arguments import OPERATIONS

NOT_DIFFERENTIABLE = ("count", "saved_projection")  # results
below_autograd = torch._C._AutoDispatchBelowAutograd  # a context: operations in it check no argument for derivatives


def refuse_tangents(args, tangents):
    """The `jvp` of operations whose tangents a decomposition computes."""
    raise NotImplementedError("pom_ext: this operation has no rule for tangents")


def differentiable(
    library: torch.library.Library,
    name: str,
    vjp: Callable,
    jvp: Callable = refuse_tangents,
    *,
    saved_results: int = 0,
    decomposition: Callable | None = None,
    unread: Collection[str] = (),
    with_count: Callable | None = None,
) -> None:
    """Give an operation its derivatives.

    Args:
        library: torch.library.Library to register with.
        name: of the operation.
        vjp: vjp(args, needed, *grad_results) -> {name: grad}. `args`: the arguments by name. `needed`: the names whose
            gradients are needed. A gradient of a result is None if nothing depends on the result; at least one is not.
        jvp: jvp(args, tangents) -> a tangent or None for every result. `tangents`: those that exist, by name.
        saved_results: how many of the last results `vjp` and `jvp` find as args["out"].
        decomposition: decomposition(args) -> results, in place of `jvp`: the same function of other operations. It also
            computes gradients of calls with an "x_tangent".
        unread: arguments that no derivative reads. They are not saved: args holds True in place of a tensor.
        with_count: with_count(args) -> results of other operations, if the argument "count" has a derivative.
    """
    operation, defaults = OPERATIONS[name]
    names = list(defaults)
    results = [result.name for result in operation._schema.returns]

    def forward(keyset, *values):
        # Grad modes are those of the level above; a Function has switched them off for the levels below.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below_autograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *values)

    def setup_context(ctx, inputs, output):
        values = [
            True if name in unread and isinstance(value, torch.Tensor) else value
            for name, value in zip(names, inputs[1:], strict=True)
        ]
        saved = [value if isinstance(value, torch.Tensor) else None for value in values]
        saved += output[len(output) - saved_results :] if saved_results else ()
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.constants = [None if isinstance(value, torch.Tensor) else value for value in values]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output[i] for i, name in enumerate(results) if name in NOT_DIFFERENTIABLE))

    def saved_arguments(ctx):
        saved = ctx.saved_tensors
        values = {
            name: constant if tensor is None else tensor
            for name, tensor, constant in zip(names, saved, ctx.constants, strict=False)
        }
        return values | {"out": saved[len(names) :]} if saved_results else values

    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * (len(names) + 1)
        args = saved_arguments(ctx)
        needed = {name for name, needs in zip(names, ctx.needs_input_grad[1:], strict=True) if needs}
        found = vjp(args, needed, *grads)
        return None, *(None if args[name] is None else found.get(name) for name in names)

    def forward_derivative(ctx, _, *tangents):
        # torch switches forward mode off here, for all levels. Lower levels must see `jvp`, this one must not.
        with forward_ad._set_fwd_grad_enabled(True):
            args = {name: _primal(value) for name, value in saved_arguments(ctx).items()}
            return jvp(args, {name: t for name, t in zip(names, tangents, strict=True) if t is not None})

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": forward_derivative}
    function: Any = type(name, (_SingleLevelFunction,), {k: staticmethod(v) for k, v in methods.items()})

    count_at = names.index("count") if with_count else -1
    tangent_at = names.index("x_tangent") if decomposition else -1

    def kernel(keyset, *values):
        if with_count is not None and values[count_at] is not None:
            count = (values[count_at],)
            if needs_gradient(count) or has_tangent(count):
                return with_count(dict(zip(names, values, strict=True)))
        tangents = has_tangent(values)
        if decomposition is not None and (tangents or (values[tangent_at] is not None and needs_gradient(values))):
            return decomposition(dict(zip(names, values, strict=True)))
        if tangents or needs_gradient(values):
            with enable_single_level_autograd_function():
                return function.apply(keyset, *values)
        with below_autograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *values)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def register_decomposition(library, name, decomposition):
    """Replace an operation by decomposition(args) -> results, of other operations, if a derivative of it is needed."""
    operation, names = OPERATIONS[name]

    def kernel(keyset, *values):
        if needs_gradient(values) or has_tangent(values):
            return decomposition(dict(zip(names, values, strict=True)))
        with below_autograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *values)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def refuse_derivatives(library, name, message):
    """Make an operation raise if an argument has a tangent or its gradient is recorded."""

    def refuse(args):
        raise RuntimeError(message)

    register_decomposition(library, name, refuse)


def primal_and_tangent(tensor):
    """(primal, tangent or None) at the current level of forward differentiation; (None, None) of None."""
    return (None, None) if tensor is None else torch._VF._unpack_dual(tensor, level=0)


def make_dual(primal, tangent):
    return torch._VF._make_dual(primal, tangent, level=0)


def _primal(value):
    if isinstance(value, tuple):
        return tuple(map(_primal, value))
    return primal_and_tangent(value)[0] if isinstance(value, torch.Tensor) else value


def needs_gradient(values):
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*values)


def has_tangent(values):
    """Whether one of the values is a tensor with a tangent, at the current level of forward differentiation."""
    # Inside a graph that is being compiled only torch.func's levels tell; torch keeps one level of duals for them all.
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return False
    return any(isinstance(x, torch.Tensor) and torch._VF._unpack_dual(x, level=0)[1] is not None for x in values)
