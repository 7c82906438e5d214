"""Derivatives of registered operations, backward and forward, as their kernel for torch's dispatch key Autograd.

`torch.library.register_autograd` knows backward alone: a tangent that reaches such an operation is dropped without a word.
An `autograd.Function` with a `jvp` knows both, but `torch.compile(fullgraph=True)` refuses it. Here the Function lives
inside the operation: the compiler sees an operation, and torch.func comes by once for each of its levels.
"""

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

WITHOUT_GRADIENT = ("count", "kept")  # results


def differentiable(library, operation, vjp, jvp=None, *, keeps=0, parts=None, forgets=(), instead=None):
    """Give an operation its derivatives.

    Args:
        library: torch.library.Library to register with.
        operation: its OpOverload, without default arguments.
        vjp: of the arguments by name, the set of names whose gradients are asked for, and a gradient or None for every result, at
            least one of them a gradient: gradients of arguments by name.
        jvp: of the arguments by name and the tangents there are, by name: a tangent or None for every result.
        keeps: how many of the last results `vjp` and `jvp` find as the argument "out".
        parts: in place of `jvp`: the same function made of other operations, which takes over where there is a tangent.
        forgets: arguments that no derivative reads. They are not kept: `vjp` and `jvp` find True in place of a tensor.
        instead: of all arguments: the results by other operations, or None to go on here.
    """
    names = [argument.name for argument in operation._schema.arguments]
    results = [result.name for result in operation._schema.returns]

    def forward(keyset, *arguments):
        # Grad modes are those of the level above; a Function has switched them off for the levels below.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def setup_context(ctx, inputs, output):
        arguments = inputs[1:]
        kept = [not isinstance(value, torch.Tensor) or name not in forgets for name, value in zip(names, arguments)]
        arguments = [value if keep else True for value, keep in zip(arguments, kept)]
        saved = [value if isinstance(value, torch.Tensor) else None for value in arguments]
        saved += output[len(output) - keeps :] if keeps else ()
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.rest = [None if isinstance(value, torch.Tensor) else value for value in arguments]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output[i] for i, name in enumerate(results) if name in WITHOUT_GRADIENT))

    def arguments_of(ctx):
        saved = ctx.saved_tensors
        values = {name: rest if value is None else value for name, value, rest in zip(names, saved, ctx.rest)}
        return values | {"out": saved[len(names) :]} if keeps else values

    def needed_by(ctx):
        return {name for name, needed in zip(names, ctx.needs_input_grad[1:]) if needed}

    def backward(ctx, *grads):
        arguments = arguments_of(ctx)
        found = {} if all(grad is None for grad in grads) else vjp(arguments, needed_by(ctx), *grads)
        return None, *(None if arguments[name] is None else found.get(name) for name in names)

    def forward_derivative(ctx, _, *tangents):
        # torch switches forward mode off here, for all levels; those below must see what `jvp` does. This one must not.
        with forward_ad._set_fwd_grad_enabled(True):
            arguments = {name: _primal(value) for name, value in arguments_of(ctx).items()}
            return jvp(arguments, {name: tangent for name, tangent in zip(names, tangents) if tangent is not None})

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": forward_derivative}
    function = type(operation._opname, (_SingleLevelFunction,), {k: staticmethod(v) for k, v in methods.items()})

    def kernel(keyset, *arguments):
        if instead is not None and (results := instead(*arguments)) is not None:
            return results
        moving = has_tangent(arguments)
        if moving and parts is not None:
            return parts(*arguments)
        if moving or needs_gradient(arguments):
            with enable_single_level_autograd_function():
                return function.apply(keyset, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    library.impl(operation._opname, kernel, "Autograd", with_keyset=True)


def made_of(library, operation, parts):
    """An operation that is replaced by others, `parts` of the same arguments, where a derivative of it is asked for."""

    def kernel(keyset, *arguments):
        if needs_gradient(arguments) or has_tangent(arguments):
            return parts(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    library.impl(operation._opname, kernel, "Autograd", with_keyset=True)


def below_autograd(operation, *arguments):
    """A call of which no derivative is asked for: it need not be looked for in every argument."""
    with torch._C._AutoDispatchBelowAutograd():
        return operation(*arguments)


def refuse_derivatives(library, operation, message):
    """An operation that has none raises if a tangent comes in, or a tensor whose gradient is recorded."""

    def kernel(keyset, *arguments):
        if has_tangent(arguments) or needs_gradient(arguments):
            raise RuntimeError(message)
        with torch._C._AutoDispatchBelowAutograd():
            return operation.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    library.impl(operation._opname, kernel, "Autograd", with_keyset=True)


def _primal(value):
    """Without the tangent of the level at hand."""
    if isinstance(value, tuple):
        return tuple(map(_primal, value))
    return torch._VF._unpack_dual(value, level=0)[0] if isinstance(value, torch.Tensor) else value


def needs_gradient(arguments):
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def has_tangent(arguments):
    """Whether one of the arguments is a tensor with a tangent, at the level of forward differentiation at hand."""
    # Inside a graph that is being compiled only torch.func's levels tell; torch keeps one level of duals for them all.
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return False
    return any(isinstance(x, torch.Tensor) and torch._VF._unpack_dual(x, level=0)[1] is not None for x in arguments)
