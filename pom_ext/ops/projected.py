"""The layer's projections together with what is between them, by the cheapest way there is.

The state is only ever summed, so on the CPU the projected tokens are held a block at a time, in cache, and never whole;
with one gate per head the readout is folded into the output projection, which then need not run over tokens.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops import _projections
from .checks import FORMS, check_state, is_integer, under_autocast
from .functional import angles_of, coefficients_of, context_of, only_one, prior_of, query_offsets
from .state import State

# When a GPU gains by folding, by arithmetic for an H100 and not measured.
# Without gradients it is two kernels in the place of three. The fold of a group reads W_o, 2 D C bytes, from L2, at
# some 5.5 TB/s: as long as the output projection of 127 queries takes, 2 D C operations each at 700 TFLOP/s.
LEAST_OF_GROUP_ON_GPU = 128
# With gradients it is a dozen small kernels and a dozen for them, 2 to 3 µs each, some 60 µs of a call: as long as the
# three products of the output projection that it saves take for 3,300 queries (6 D C each; D = 1024, C = 2048).
LEAST_ON_GPU = 4096


def is_plain(projection):
    """Whether a module is nothing but x Wᵀ + b, so that its weight may be read past its call.

    Hooks, parametrizations, adapters and quantised weights are somebody's change of that: such a module is called.
    """
    if type(projection) is not nn.Linear or "forward" in projection.__dict__ or _has_any_global_hook():
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parameters = (projection.weight, projection.bias)
    return not any(getattr(projection, name) for name in hooks) and not any(
        map(is_traceable_wrapper_subclass, parameters)
    )


def are_plain(x, *projections):
    """Whether the operations of this module may take the place of these projections of x."""
    return not is_traceable_wrapper_subclass(x) and all(map(is_plain, projections))


def _cast(*tensors):
    """As torch's matrix products take them: under autocast in its dtype."""
    if not under_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _same_dtype(x, *projections):
    """x and the weights and biases of projections, or what torch.nn.functional.linear says of tensors that do not go
    together, before a kernel sees them."""
    parameters = [t for projection in projections for t in (projection.weight, projection.bias)]
    x, *parameters = _cast(x, *parameters)
    dtype = x.dtype
    for name, t in zip(("weight", "bias") * len(projections), parameters):
        if t is not None and t.dtype != dtype:
            raise TypeError(f"x: expected {t.dtype} as the {name} of the projection, got {dtype}; use .to() on either")
    return x, *parameters


def project(projection, x):
    """projection(x), by the fastest product of matrices that torch has for it."""
    if x.device.type != "cpu" or not are_plain(x, projection):
        return projection(x)
    return _projections.linear(*_same_dtype(x, projection))


def projected_state(
    x, projection, coeff, *, form, degree, weight=None, frames=None, cu_seqlens=None, rotary=None, state=None,
    keep=False,
):  # fmt: skip
    """`polynomial_state` of projection(x), a plain nn.Linear, without storing it.

    keep: store it after all, for the gradients, which otherwise project again. The other arguments but the first two,
    returns and raises: as of `polynomial_state`.
    """
    tokens, matrix, bias = _same_dtype(x, projection)
    only_one(frames=frames, cu_seqlens=cu_seqlens)
    if state is not None:
        only_one(state=state, cu_seqlens=cu_seqlens)
        check_state("state", state, x.shape[0], len(matrix), tokens.dtype, x)
    weight, _, offsets, cumulative = context_of(tokens, weight, None, frames, cu_seqlens)
    *new, _ = torch.ops.pom_ext.project_state(
        tokens, matrix, bias, coefficients_of(coeff, tokens), weight, offsets, cumulative, *prior_of(state),
        *angles_of(rotary), FORMS.index(form), degree, keep,
    )  # fmt: skip
    return State(*new)


def projected_readout(
    x, gate_projection, out_projection, state, *, form, n_sel_heads=1, frames=None, cu_seqlens=None, rotary=None,
    keep=False,
):  # fmt: skip
    """out_projection(polynomial_readout(gate_projection(x), state)), both plain nn.Linear, a block of tokens at a time.

    keep: store the gates for the gradients, which otherwise project again. The other arguments but the first three and
    raises: as of `polynomial_readout`. Returns (B, M, D).
    """
    tokens, gate_matrix, gate_bias, out_matrix, out_bias = _same_dtype(x, gate_projection, out_projection)
    offsets = query_offsets(x, state.total.shape[1], frames, cu_seqlens)
    y, _ = torch.ops.pom_ext.project_readout(
        tokens, gate_matrix, gate_bias, state.total, state.residual, state.count, out_matrix, out_bias, offsets,
        *angles_of(rotary), FORMS.index(form), n_sel_heads, keep,
    )  # fmt: skip
    return y


def folding_pays(x, groups, channels, n_sel_heads, *, even=True):
    """Whether `folded_readout` of queries (B, M, D) takes less arithmetic than an output projection of all of them.

    even: whether the queries are dealt evenly to the groups, with no need of offsets.
    """
    if n_sel_heads == 1:
        return False
    if x.device.type == "cuda":
        gradients = torch.is_grad_enabled()
        if x.shape[0] * x.shape[1] < LEAST_ON_GPU if gradients else x.shape[1] < LEAST_OF_GROUP_ON_GPU * groups:
            return False
    gates = n_sel_heads if even else n_sel_heads * groups  # that a token is multiplied with
    return groups * n_sel_heads * channels + x.shape[1] * gates < x.shape[1] * channels


def folded_readout(
    x, gate_projection, out_projection, state, *, form, n_sel_heads, frames=None, cu_seqlens=None, rotary=None
):
    """The readout with one gate per head, and the mean features of a head folded into the output projection:

        y_m = Σ_h γ(g)_mh (W_o[:, h] H[h]) + b_o

    Args:
        x: (B, M, D) query tokens.
        gate_projection: x to (B, M, n_sel_heads).
        out_projection: an nn.Linear of C channels.
        state, frames, cu_seqlens, rotary: as of `polynomial_readout`.

    Returns:
        (B, M, D).
    """
    # One frame length deals the queries evenly.
    offsets = None if is_integer(frames) else query_offsets(x, state.total.shape[1], frames, cu_seqlens)
    sums, rest = (state.total, state.residual, state.count), (*angles_of(rotary), FORMS.index(form))
    # On a GPU gradients come from torch's own products.
    if (x.device.type == "cpu" or not torch.is_grad_enabled()) and are_plain(x, gate_projection):
        tokens, gate_matrix, gate_bias, matrix, bias = _same_dtype(x, gate_projection, out_projection)
        return torch.ops.pom_ext.folded_readout(tokens, gate_matrix, gate_bias, *sums, matrix, bias, offsets, *rest)
    weight, bias = _cast(out_projection.weight, out_projection.bias)
    folded = _projections.fold(*sums, weight, n_sel_heads)
    value = _projections.gate_values(project(gate_projection, x), None, *rest)
    return _projections.multiply_folded(value, folded, bias, offsets)
