"""The linear map as an operation of this library, and the layer's projections through it.

On the CPU it is the fastest product of matrices that torch has for it (csrc/torch/linear.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._autograd import differentiable
from .arguments import OPERATIONS, Projection, call
from .checks import accumulator, under_autocast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) times (out, in)ᵀ plus (out,)."""
    return call("linear", x=x.reshape(-1, x.shape[-1]), weight=weight, bias=bias).view(*x.shape[:-1], len(weight))


def linear_grads(x: Tensor, projection: Projection, grad_y: Tensor, needed: set[str]) -> dict[str, Tensor | None]:
    """Gradients of `linear` by name: those of "x", "weight" and "bias" that are needed."""
    (weight, bias), grads = projection, {}
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    if "x" in needed:
        grads["x"] = call("linear", x=grad_rows, weight=weight.t()).view(x.shape)
    if "weight" in needed:
        grads["weight"] = call("linear", x=grad_rows.t(), weight=rows.t())
    if "bias" in needed:
        grads["bias"] = None if bias is None else grad_rows.sum(0, dtype=accumulator(x.dtype)).to(x.dtype)
    return grads


def linear_vjp(x, needed, grad_y):
    return linear_grads(x["x"], Projection(x["weight"], x["bias"]), grad_y, needed)


def linear_jvp(x, t):
    if "x" in t and "weight" in t:  # both terms as one product, of twice the inputs
        rows, weight = torch.cat([t["x"], x["x"]], dim=1), torch.cat([x["weight"], t["weight"]], dim=1)
        return call("linear", x=rows, weight=weight, bias=t.get("bias"))
    if "x" in t or "weight" in t:
        return call("linear", x=t.get("x", x["x"]), weight=t.get("weight", x["weight"]), bias=t.get("bias"))
    return t["bias"].expand(len(x["x"]), -1)


def batched_one_by_one(name):
    """The rule of torch.vmap that calls the operation once for each sample."""
    operation = OPERATIONS[name].function

    def rule(info, dims, *arguments):
        results = [
            operation(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def _batched(info, dims, x, weight, bias):
    """One product of more rows; one product for each sample if the weights differ."""
    if dims[1:] != (None, None):
        return batched_one_by_one("linear")(info, dims, x, weight, bias)
    rows = x.movedim(dims[0], 0)
    return call("linear", x=rows.flatten(0, 1), weight=weight, bias=bias).unflatten(0, rows.shape[:2]), 0


def register(library: torch.library.Library) -> None:
    torch.library.register_fake("pom_ext::linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))
    torch.library.register_vmap("pom_ext::linear", _batched)
    library.impl("linear", F.linear, "CUDA")
    differentiable(library, "linear", linear_vjp, linear_jvp)


def is_unmodified_linear(projection: nn.Module) -> bool:
    """Whether a module is nothing but x Wᵀ + b, so that an operation may read its weight in place of calling it.

    Hooks, parametrizations, adapters and quantised weights change the map: such a module is called.
    """
    if type(projection) is not nn.Linear or "forward" in projection.__dict__ or _has_any_global_hook():
        return False
    hooked = projection._forward_hooks or projection._forward_pre_hooks
    hooked = hooked or projection._backward_hooks or projection._backward_pre_hooks
    # Twice as fast as projection.weight, which asks for attributes of other kinds first.
    parameters = projection._parameters
    return not hooked and not _is_wrapper(parameters["weight"]) and not _is_wrapper(parameters["bias"])


def _is_wrapper(t: Tensor | None) -> bool:
    """Whether this is a tensor that holds others, such as a quantised weight."""
    return t is not None and type(t) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(t)


def all_unmodified(x: Tensor, *projections: nn.Module) -> bool:
    """Whether operations may take the place of these projections of x."""
    return not _is_wrapper(x) and all(map(is_unmodified_linear, projections))


def cast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as torch's matrix products take them: under autocast in its dtype."""
    if not under_autocast(x):
        return x, *tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *tensors))


def projection_arguments(x: Tensor, *projections: nn.Module) -> tuple[Any, ...]:
    """x and the projections for a kernel, of one dtype.

    Raises:
        TypeError: x and a projection differ in dtype, as torch.nn.functional.linear would say it.
    """
    parameters: list[Any] = []
    for projection in projections:
        parameters += (projection.weight, projection.bias)
    x, *parameters = cast(x, *parameters)
    dtype, arguments = x.dtype, []
    for i in range(0, len(parameters), 2):
        weight, bias = parameters[i : i + 2]
        if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
            name, t = ("weight", weight) if weight.dtype != dtype else ("bias", bias)
            raise TypeError(f"x: expected {t.dtype} as the {name} of the projection, got {dtype}; use .to() on either")
        arguments.append(Projection(weight, bias))
    return x, *arguments


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """projection(x), by the fastest product of matrices that torch has for it."""
    if x.device.type != "cpu" or not all_unmodified(x, projection):
        return projection(x)
    x, (weight, bias) = projection_arguments(x, projection)
    return linear(x, weight, bias)
