"""What torch knows of the compiled operations beside their kernels: shapes of the results, and gradients.

Gradients are registered operations too, so that traced graphs contain them. They save inputs and the state alone;
features are computed again.
"""

import torch

from .checks import FORMS, accumulator


def _new_state(u, groups):
    dtype = accumulator(u.dtype)
    total = u.new_empty(u.shape[0], groups, u.shape[2], dtype=dtype)
    return total, torch.empty_like(total), u.new_empty(u.shape[0], groups, dtype=torch.float64)


def _new_coeff_grad(u, form, degree):
    return u.new_empty(*((u.shape[2], degree) if form == FORMS.index("power") else (0, 0)), dtype=accumulator(u.dtype))


def _contiguous_like(t):
    return t.new_empty(t.shape)


def _state_fake(u, coeff, weight, mask, offsets, cumulative, cos, sin, axes, form, degree):
    groups = mask.shape[1] if mask is not None else offsets.shape[0] - 1 if offsets is not None else 1
    return _new_state(u, groups)


def _state_backward_fake(grad_total, u, coeff, weight, mask, offsets, cumulative, cos, sin, axes, form, degree):
    return _contiguous_like(u), _new_coeff_grad(u, form, degree)


def _readout_fake(gate, total, residual, count, offsets, cos, sin, axes, form, heads):
    return gate.new_empty(gate.shape[0], gate.shape[1], total.shape[2])


def _readout_backward_fake(grad_y, gate, total, residual, count, offsets, cos, sin, axes, form, heads):
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


def _save(*positions):
    """A setup_context that keeps all inputs: tensors at `positions` through autograd, the rest as they are."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(inputs[i] for i in positions))
        ctx.rest = inputs[len(positions) :]
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(output[-1])  # the count

    return setup_context


def _state_backward(ctx, grad_total, grad_residual, grad_count):
    # The residual is rounding error of the total: as a function of the inputs its derivative is zero.
    saved = ctx.saved_tensors
    grad_u, grad_coeff = torch.ops.pom_ext.state_backward(grad_total, *saved, *ctx.rest)
    return grad_u, None if saved[1] is None else grad_coeff, *[None] * 9


def _readout_backward(ctx, grad_y):
    grad_gate, grad_total = torch.ops.pom_ext.readout_backward(grad_y, *ctx.saved_tensors, *ctx.rest)
    return grad_gate, grad_total, grad_total, *[None] * 7


def _causal_mix_backward(ctx, grad_y, grad_total, grad_residual, grad_count):
    saved = ctx.saved_tensors
    grads = torch.ops.pom_ext.causal_mix_backward(grad_y, grad_total, *saved, *ctx.rest)
    grad_u, grad_gate, grad_coeff, grad_prior = grads
    coeff, prior = saved[2], saved[4]
    grad_coeff = None if coeff is None else grad_coeff
    grad_prior = None if prior is None else grad_prior
    return grad_u, grad_gate, grad_coeff, None, grad_prior, grad_prior, *[None] * 9


def _save_mix(ctx, inputs, output):
    u, gate, coeff, weight, prior = inputs[:5]
    cos, sin, axes, gate_cos, gate_sin, gate_axes = inputs[7:13]
    ctx.save_for_backward(u, gate, coeff, weight, *output[1:], cos, sin, gate_cos, gate_sin)
    ctx.has_prior = prior is not None
    ctx.rest = axes, gate_axes, *inputs[13:]
    ctx.mark_non_differentiable(output[-1])  # the count


def _mix_backward(ctx, grad_y, grad_total, grad_residual, grad_count):
    u, gate, coeff, weight, total, residual, count, cos, sin, gate_cos, gate_sin = ctx.saved_tensors
    axes, gate_axes, form, degree, heads = ctx.rest
    grad_gate, grad_state = torch.ops.pom_ext.readout_backward(
        grad_y, gate, total, residual, count, None, gate_cos, gate_sin, gate_axes, form, heads
    )
    if grad_total is not None:
        grad_state = grad_state + grad_total
    grad_u, grad_coeff = torch.ops.pom_ext.state_backward(
        grad_state, u, coeff, weight, None, None, False, cos, sin, axes, form, degree
    )
    grad_coeff = None if coeff is None else grad_coeff
    grad_prior = grad_state if ctx.has_prior else None
    return grad_u, grad_gate, grad_coeff, None, grad_prior, grad_prior, *[None] * 10


def _no_double_backward(ctx, *grads):
    raise RuntimeError("pom_ext: gradients of gradients are not defined yet; call backward without create_graph=True")


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
    }.items():
        torch.library.register_fake(f"pom_ext::{name}", fake)
    for name, backward, tensors in (
        ("state", _state_backward, 5),
        ("readout", _readout_backward, 7),
        ("causal_mix", _causal_mix_backward, 11),
    ):
        torch.library.register_autograd(f"pom_ext::{name}", backward, setup_context=_save(*range(tensors)))
        torch.library.register_autograd(f"pom_ext::{name}_backward", _no_double_backward)
    torch.library.register_autograd("pom_ext::mix", _mix_backward, setup_context=_save_mix)
