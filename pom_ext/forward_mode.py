"""Forward-mode derivatives of whole models, without products by zero and passes over memory that torch's own make.

torch multiplies by the tangent of the weights of a linear map too where there is none: a model then costs three products
for every one. Here it costs two. A layer norm takes torch some ten passes more, here one.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .ops.checks import under_autocast


def _still(*tensors):
    return all(tensor is None or unpack_dual(tensor).tangent is None for tensor in tensors)


def _linear_in_input(function, input, weight, bias=None, *rest, **options):
    given, tangent = unpack_dual(input)
    if tangent is None or not _still(weight, bias):
        return function(input, weight, bias, *rest, **options)
    y = function(given, weight, bias, *rest, **options)
    return make_dual(y, function(tangent, weight, None, *rest, **options))


def _layer_norm(function, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """The matrix of derivatives of the norm is symmetric: what takes gradients back through it takes tangents forward.

    And gradients of the tangent are right, where those of torch's own are not (pytorch/pytorch#196700).
    """
    if _still(input, weight, bias):
        return function(input, normalized_shape, weight, bias, eps)
    x, tangent = unpack_dual(input)
    if under_autocast(x):
        x = x.to(function(x.new_empty((0, *normalized_shape)), normalized_shape).dtype)
    y, mean, scale = torch.native_layer_norm(x, normalized_shape, None, None, eps)
    if tangent is not None:
        back = torch.ops.aten.native_layer_norm_backward
        along = back(tangent.to(x.dtype), x, normalized_shape, mean, scale, None, None, [True, False, False])[0]
        y = make_dual(y, along)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _addcmul(function, input, tensor1, tensor2, **options):
    """One pass for every term of the product rule."""
    (x, moved), (a, along_a), (b, along_b) = (unpack_dual(t) for t in (input, tensor1, tensor2))
    y = function(x, a, b, **options)
    for one, other in ((along_a, b), (a, along_b)):
        if one is not None and other is not None:
            moved = function(torch.zeros_like(x) if moved is None else moved, one, other, **options)
    return y if moved is None else make_dual(y, moved.to(y.dtype).expand_as(y))


def _dual(x):
    return unpack_dual(x) if isinstance(x, torch.Tensor) else (x, None)


def _bilinear(function, input, other):
    """A product, or a quotient by what stands still."""
    (x, along_x), (y, along_y) = _dual(input), _dual(other)
    if function is torch.Tensor.div and along_y is not None:
        return function(input, other)
    parts = [function(a, b) for a, b in ((along_x, y), (x, along_y)) if a is not None and b is not None]
    return make_dual(function(x, y), sum(parts[1:], parts[0])) if parts else function(x, y)


def _add(function, input, other, **options):
    """To what stands still: torch decomposes that in Python, which takes longer than the sum."""
    (x, along_x), (y, along_y) = _dual(input), _dual(other)
    if options or (along_x is None) == (along_y is None):
        return function(input, other, **options)
    total, tangent = function(x, y), along_y if along_x is None else along_x
    return make_dual(total, tangent.to(total.dtype).expand_as(total))


def _method(function, *args, **options):
    """As a function of torch: the method, which is Python, cannot be compiled in a mode."""
    return getattr(torch, function.__name__)(*args, **options)


_RULES = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), _linear_in_input),
    F.layer_norm: _layer_norm,
    torch.addcmul: _addcmul,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.mul, torch.Tensor.div), _bilinear),
    torch.Tensor.add: _add,
    **dict.fromkeys((torch.Tensor.unflatten, torch.Tensor.split), _method),
}


class _Rules(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            rule = _RULES.get(function)
            return function(*args, **kwargs) if rule is None else rule(function, *args, **kwargs)
        for known, rule in _RULES.items():  # a method is not found by its hash
            if function is known:
                return rule(function, *args, **kwargs)
        return function(*args, **kwargs)


def _by_duals(function, primals, tangents):
    """torch.func.jvp by torch's dual tensors alone: without its levels, which every operation passes twice."""
    with forward_ad.dual_level():
        results, form = tree_flatten(function(*tree_map(make_dual, primals, tangents)))
        values, along = zip(*map(unpack_dual, results))
        along = [torch.zeros_like(y) if moved is None else moved for y, moved in zip(values, along)]
    return tree_unflatten(values, form), tree_unflatten(along, form)


def jvp(function, primals, tangents):
    """The value of a function and its derivative in a direction, as torch.func.jvp, faster where weights stand still.

    Args:
        function: of tensors, or tuples and dictionaries of them; a model, say. Called again where it takes such
            derivatives itself.
        primals, tangents: tuples: where, and in which direction.

    Returns:
        value, tangent. Gradients flow through both.
    """

    def quickly(*primals):
        with _Rules():
            return function(*primals)

    alone = forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()
    if alone and not torch.compiler.is_compiling():
        try:
            return _by_duals(quickly, primals, tangents)
        except RuntimeError as error:
            if "Nested forward mode" not in str(error):
                raise
    return torch.func.jvp(quickly, primals, tangents)
