"""The operations of `_projections` on a GPU: by products and kernels in turn, or at once where there is a kernel for it.

A block of projected tokens stays in the GPU's second cache between the product that writes it and the kernel that reads
it. What the blocks have in common is written in place, so that a block is no more launches than its products and its
kernels. Groups of tokens are not cut into blocks: their offsets lie on the GPU, and looking at them would wait for it.
"""

import torch
import torch.nn.functional as F

from ..ops import _projections as whole
from .checks import accumulator

ops = torch.ops.pom_ext
BLOCK_BYTES = 16 * 2**20  # of projected tokens: a third of the second cache of an H100
LEAST_ROWS = 1024  # of a product: fewer leave multiprocessors without work
# Whether the state is summed within the product, by the one kernel that Hopper has for it, in place of blocks. Which of
# them is faster is for a measurement to say (`benchmarks.run --case 'layer*'` on such a GPU); there is none yet.
AT_ONCE = False


def blocks(x, width):
    """Slices of samples, and for each the slices of tokens that are projected at once: all, of several samples."""
    batch, tokens = x.shape[:2]
    rows = max(LEAST_ROWS, BLOCK_BYTES // (width * x.element_size()))
    samples = max(1, rows // max(1, tokens))
    for first in range(0, batch, samples):
        yield slice(first, first + samples), [slice(n, n + rows) for n in range(0, max(1, tokens), rows)]


def _part(table, tokens):
    return None if table is None else table[tokens]


def _rows(t):
    """Tokens (B, N, D) as a matrix; of a block of a dense tensor a view."""
    return t.reshape(-1, t.shape[-1])


def _project_to(out, x, weight, bias):
    """out = x weightᵀ + bias, of tokens."""
    if bias is None:
        torch.mm(_rows(x), weight.t(), out=_rows(out))
    else:
        torch.addmm(bias, _rows(x), weight.t(), out=_rows(out))


class _Gradients:
    """Gradients of a projection's weight and bias, each in one call a block and kept in the accumulator's dtype.

    x: the tokens (B, N, D) that are projected. bias: may be None. cut: `blocks` as a list.
    """

    def __init__(self, x, bias, cut, needs_weight=True):
        self.like, self.bias, self.dtype = x, bias, accumulator(x.dtype)
        self.needs_weight, self.weight, self.block = needs_weight, None, 0
        if bias is not None:  # a row for each block
            count = sum(len(parts) for _, parts in cut)
            self.rows = x.new_empty(count, len(bias), dtype=self.dtype)

    def add(self, grad_y, x):
        if self.needs_weight:
            self._add_product(_rows(grad_y).t(), _rows(x))
        if self.bias is not None:
            torch.sum(_rows(grad_y), 0, dtype=self.dtype, out=self.rows[self.block])
        self.block += 1

    def _add_product(self, a, b):
        wider = {}
        if a.dtype != self.dtype:
            if a.is_cuda:
                wider = {"out_dtype": self.dtype}
            else:  # only on GPUs may a product be of another dtype than its factors
                a, b = a.to(self.dtype), b.to(self.dtype)
        if self.weight is None:
            self.weight = torch.mm(a, b, **wider)
        else:
            torch.addmm(self.weight, a, b, **wider, out=self.weight)

    def sums(self):
        """Of weight and bias in the dtype of the tokens; empty what is not needed, or not there."""
        x = self.like
        return (
            self.weight.to(x.dtype) if self.needs_weight else x.new_empty(0, x.shape[2]),
            x.new_empty(0) if self.bias is None else self.rows.sum(0).to(x.dtype),
        )


def project_state(
    x, weight, bias, coeff, token_weight, offsets, cumulative, total, residual, count, cos, sin, axes, form, degree,
    keep=False,
):  # fmt: skip
    prior = total, residual, count
    if AT_ONCE and axes == 0 and coeff is not None:
        call = x, weight, bias, coeff, token_weight, offsets, cumulative, *prior, degree
        if ops.projects_at_once(*call):
            return *ops.project_state_at_once(*call), x.new_empty(0, 0, 0)
    if offsets is not None or len(x) == 0:
        rest = token_weight, offsets, cumulative, *prior, cos, sin, axes, form, degree
        return whole.project_state(x, weight, bias, coeff, *rest)
    total = x.new_empty(len(x), 1, len(weight), dtype=accumulator(x.dtype))
    state = total, torch.empty_like(total), x.new_empty(len(x), 1, dtype=torch.float64)
    for samples, parts in blocks(x, len(weight)):
        before = [None if t is None else t[samples] for t in prior]
        for n in parts:
            u = whole.linear(x[samples, n], weight, bias)
            weights = None if token_weight is None else token_weight[samples, n]
            angles, first = (_part(cos, n), _part(sin, n), axes, form, degree), n.start == 0
            given = before if first else [None] * 3
            ops.add_to_state(u, coeff, weights, *given, *angles, first, *(t[samples] for t in state))
    return *state, x.new_empty(0, 0, 0)


def project_state_backward(
    grad_total, x, weight, bias, coeff, token_weight, offsets, cumulative, cos, sin, axes, form, degree, kept, needs_x,
    needs_weight,
):  # fmt: skip
    if offsets is not None or len(x) == 0:
        rest = token_weight, offsets, cumulative, cos, sin, axes, form, degree, None, needs_x, needs_weight
        return whole.project_state_backward(grad_total, x, weight, bias, coeff, *rest)
    cut, grad_x, grad_coeff = list(blocks(x, len(weight))), x.new_empty(x.shape if needs_x else (0, 0, 0)), None
    grads = _Gradients(x, bias, cut, needs_weight)
    for samples, parts in cut:
        for n in parts:
            tokens = x[samples, n]
            u = whole.linear(tokens, weight, bias)
            weights = None if token_weight is None else token_weight[samples, n]
            context = weights, None, None, False, _part(cos, n), _part(sin, n), axes, form, degree
            grad_u, grad_c = ops.state_backward(grad_total[samples], u, coeff, *whole.NO_TANGENTS, *context)
            if needs_x:
                torch.mm(_rows(grad_u), weight, out=_rows(grad_x[samples, n]))
            grads.add(grad_u, tokens)
            grad_coeff = grad_c if grad_coeff is None else grad_coeff.add_(grad_c)
    return grad_x, *grads.sums(), grad_coeff


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
            mixed = _read(whole.linear(x[samples, n], gate_weight, gate_bias), state, n, cos, sin, axes, form, heads)
            _project_to(y[samples, n], mixed, out_weight, out_bias)
    return y, x.new_empty(0, 0, 0)


def _read(gate, state, tokens, cos, sin, *rest):
    total, residual, count = state
    angles = _part(cos, tokens), _part(sin, tokens)
    return ops.readout(gate, None, total, residual, *whole.NO_TANGENTS, count, None, *angles, *rest)


def project_readout_backward(
    grad_y, x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form, heads,
    kept,
):  # fmt: skip
    if total.shape[1] != 1 or len(x) == 0:
        rest = out_weight, out_bias, offsets, cos, sin, axes, form, heads, None
        return whole.project_readout_backward(grad_y, x, gate_weight, gate_bias, total, residual, count, *rest)
    cut, grad_x, grad_total = list(blocks(x, total.shape[2])), x.new_empty(x.shape), total.new_empty(total.shape)
    of_gate, of_out = _Gradients(x, gate_bias, cut), _Gradients(x, out_bias, cut)
    for samples, parts in cut:
        state = total[samples], residual[samples], count[samples]
        for n in parts:
            tokens, back = x[samples, n], grad_y[samples, n]
            gate = whole.linear(tokens, gate_weight, gate_bias)
            mixed = _read(gate, state, n, cos, sin, axes, form, heads)
            grad_mixed = whole.linear(back, out_weight.t(), None)
            angles = _part(cos, n), _part(sin, n), axes, form, heads
            grad_gate, grad_state = ops.readout_backward(grad_mixed, gate, None, *state, None, *angles)
            torch.mm(_rows(grad_gate), gate_weight, out=_rows(grad_x[samples, n]))
            of_gate.add(grad_gate, tokens)
            of_out.add(back, mixed)
            grad_total[samples].copy_(grad_state) if n.start == 0 else grad_total[samples].add_(grad_state)
    return grad_x, *of_gate.sums(), grad_total, *of_out.sums()


def folded_readout(
    x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets, cos, sin, axes, form
):
    call = x, gate_weight, gate_bias, total, residual, count, out_weight, out_bias, offsets
    if axes == 0 and ops.folds_at_once(*call, form):
        return ops.folded_readout_at_once(*call, form)
    return whole.folded_readout(*call, cos, sin, axes, form)


def register(library):
    library.impl("linear", F.linear, "CUDA")
    operations = project_state, project_state_backward, project_readout, project_readout_backward, folded_readout
    for function in operations:
        library.impl(function.__name__, function, "CUDA")
