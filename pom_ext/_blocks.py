"""The operations of `_projections` on a GPU: by products and kernels in turn, or at once where there is a kernel for it.

A block of projected tokens stays in the GPU's second cache between the product that writes it and the kernel that reads
it. Groups of tokens are not cut into blocks: their offsets lie on the GPU, and looking at them would wait for it.
"""

from functools import reduce

import torch
import torch.nn.functional as F

from . import _projections as whole
from .checks import accumulator
from .state import State

BLOCK_BYTES = 16 * 2**20  # of projected tokens: a third of the second cache of an H100
LEAST_ROWS = 1024  # of a product: fewer leave multiprocessors without work
# Whether the state is summed within the product, by the one kernel that Hopper has for it, in place of blocks. Which of
# them is faster is for a measurement to say (`benchmarks.run --case 'layer*'` on such a GPU); there is none yet.
AT_ONCE = False


def blocks(x, width):
    """Slices of samples, and for each the slices of tokens that are projected at once."""
    batch, tokens = x.shape[:2]
    rows = max(LEAST_ROWS, BLOCK_BYTES // (width * x.element_size()))
    samples = max(1, rows // max(1, tokens))
    for first in range(0, batch, samples):
        yield slice(first, first + samples), [slice(n, n + rows) for n in range(0, max(1, tokens), rows)]


def _part(table, tokens):
    return None if table is None else table[tokens]


def _add(sums, grads, dtype):
    """Sums of gradients by name, kept in a dtype."""
    for name, grad in grads.items():
        sums[name] = grad.to(dtype) if name not in sums else sums[name].add_(grad)


def project_state(x, weight, bias, coeff, token_weight, offsets, cumulative, cos, sin, axes, form, degree, keep=False):
    def of(samples, tokens):
        weights = None if token_weight is None else token_weight[samples, tokens]
        context = weights, None, False, _part(cos, tokens), _part(sin, tokens), axes, form, degree
        return State(*whole.project_state(x[samples, tokens], weight, bias, coeff, *context)[:3])

    if AT_ONCE and axes == 0 and coeff is not None:
        call = x, weight, bias, coeff, token_weight, offsets, cumulative, degree
        if torch.ops.pom_ext.projects_at_once(*call):
            return *torch.ops.pom_ext.project_state_at_once(*call), x.new_empty(0, 0, 0)
    if offsets is not None or len(x) == 0:
        rest = token_weight, offsets, cumulative, cos, sin, axes, form, degree
        return whole.project_state(x, weight, bias, coeff, *rest)
    states = [reduce(State.merge, (of(samples, n) for n in parts)) for samples, parts in blocks(x, len(weight))]
    return *State.cat(states, dim=0).state_dict().values(), x.new_empty(0, 0, 0)


def project_state_backward(
    grad_total, x, weight, bias, coeff, token_weight, offsets, cumulative, cos, sin, axes, form, degree, kept, needs_x,
    needs_weight,
):  # fmt: skip
    if offsets is not None or len(x) == 0:
        rest = token_weight, offsets, cumulative, cos, sin, axes, form, degree, None, needs_x, needs_weight
        return whole.project_state_backward(grad_total, x, weight, bias, coeff, *rest)
    grad_x, sums = torch.empty_like(x if needs_x else x[:0, :0, :0]), {}
    for samples, parts in blocks(x, len(weight)):
        for n in parts:
            weights = None if token_weight is None else token_weight[samples, n]
            context = (
                weights,
                None,
                False,
                _part(cos, n),
                _part(sin, n),
                axes,
                form,
                degree,
                None,
                needs_x,
                needs_weight,
            )
            found = whole.project_state_backward(grad_total[samples], x[samples, n], weight, bias, coeff, *context)
            if needs_x:
                grad_x[samples, n] = found[0]
            _add(sums, dict(zip(("weight", "bias", "coeff"), found[1:])), accumulator(x.dtype))
    return grad_x, sums["weight"].to(x.dtype), sums["bias"].to(x.dtype), sums["coeff"]


def project_readout(
    x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form, heads,
    keep=False,
):  # fmt: skip
    if total.shape[1] != 1 or len(x) == 0:
        rest = out_weight, out_bias, offsets, cos, sin, axes, form, heads
        return whole.project_readout(x, gate_weight, gate_bias, total, residual, count, *rest)
    y = x.new_empty(x.shape[0], x.shape[1], len(out_weight))
    for samples, parts in blocks(x, total.shape[2]):
        state = total[samples], residual[samples], count[samples]
        for n in parts:
            rest = out_weight, out_bias, None, _part(cos, n), _part(sin, n), axes, form, heads
            y[samples, n] = whole.project_readout(x[samples, n], gate_weight, gate_bias, *state, *rest)[0]
    return y, x.new_empty(0, 0, 0)


def project_readout_backward(
    grad_y, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form, heads,
    kept,
):  # fmt: skip
    if total.shape[1] != 1 or len(x) == 0:
        rest = out_weight, out_bias, offsets, cos, sin, axes, form, heads, None
        return whole.project_readout_backward(grad_y, x, gate_weight, gate_bias, total, residual, count, *rest)
    grad_x, grad_total, sums = torch.empty_like(x), torch.zeros_like(total), {}
    for samples, parts in blocks(x, total.shape[2]):
        state = total[samples], residual[samples], count[samples]
        for n in parts:
            rest = out_weight, out_bias, None, _part(cos, n), _part(sin, n), axes, form, heads, None
            found = whole.project_readout_backward(
                grad_y[samples, n], x[samples, n], gate_weight, gate_bias, *state, *rest
            )
            grad_x[samples, n] = found[0]
            grad_total[samples] += found[3]
            _add(sums, dict(enumerate((*found[1:3], *found[4:]))), accumulator(x.dtype))
    gate_grads, out_grads = (tuple(sums[i].to(x.dtype) for i in pair) for pair in ((0, 1), (2, 3)))
    return grad_x, *gate_grads, grad_total, *out_grads


def folded_readout(
    x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form
):
    call = x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets
    if axes == 0 and torch.ops.pom_ext.folds_at_once(*call, form):
        return torch.ops.pom_ext.folded_readout_at_once(*call, form)
    return whole.folded_readout(*call, cos, sin, axes, form)


def register(library):
    library.impl("linear", F.linear, "CUDA")
    operations = project_state, project_state_backward, project_readout, project_readout_backward, folded_readout
    for function in operations:
        library.impl(function.__name__, function, "CUDA")
