"""Forward-mode derivatives of whole models, without products by zero.

torch's own forward derivative of a linear map multiplies by the tangent of the weights too where there is none: a
model then costs three products for every one. Here it costs two.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_LINEAR_IN_INPUT = {F.linear, F.conv1d, F.conv2d, F.conv3d}


class _ByInputAlone(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _LINEAR_IN_INPUT or not 2 <= len(args):
            return function(*args, **kwargs)
        x, weight, bias, *rest = args if len(args) > 2 else (*args, kwargs.pop("bias", None))
        given, tangent = forward_ad.unpack_dual(x)
        fixed = all(t is None or forward_ad.unpack_dual(t).tangent is None for t in (weight, bias))
        if tangent is None or not fixed:
            return function(x, weight, bias, *rest, **kwargs)
        y = function(given, weight, bias, *rest, **kwargs)
        return forward_ad.make_dual(y, function(tangent, weight, None, *rest, **kwargs))


def jvp(function, primals, tangents):
    """The value of a function and its derivative in a direction, as torch.func.jvp, faster where weights stand still.

    Args:
        function: of tensors, or tuples and dictionaries of them; a model, say.
        primals, tangents: tuples: where, and in which direction.

    Returns:
        value, tangent. Gradients flow through both.
    """

    def quickly(*primals):
        with _ByInputAlone():
            return function(*primals)

    return torch.func.jvp(quickly, primals, tangents)
