"""The compiled operations as functions: polynomial state, readout, and both in one."""

import torch
from torch.autograd.graph import increment_version

from ..ops import _library
from .checks import (
    FORMS,
    accumulator,
    check_features,
    check_gate,
    check_rotary,
    check_state,
    check_tensor,
    check_weights,
    frame_offsets,
    offsets_tensor,
    under_autocast,
)
from .state import State

if _library.ERROR is None:
    from ._register import register

    try:
        register()
    except Exception as error:  # noqa: BLE001 -- an operation that is missing, or takes other arguments
        _library.ERROR = (
            f"pom_ext: the compiled library was built before this source ({error}). Build it again: {_library.BUILD}"
        )


def _require(tensor, name):
    """The compiled library is there and serves the device of the tensor."""
    _library.load()
    if isinstance(tensor, torch.Tensor) and tensor.device.type not in (*_library.DEVICES, "meta"):
        served = " and ".join(_library.DEVICES)
        remedy = "move it there"
        if tensor.device.type == "cuda":
            remedy += f", or build for this GPU, in the source folder and with nvcc on the path: {_library.BUILD_CUDA}"
        raise ValueError(
            f"{name}: this library has kernels for tensors on {served} only, got one on {tensor.device}; {remedy}"
        )


def _of_one_dtype(u, gate):
    """Under autocast the wider dtype of the two, as torch has it for its operations of several tensors."""
    if u.dtype == gate.dtype or not under_autocast(u):
        return u, gate
    dtype = torch.promote_types(u.dtype, gate.dtype)
    return u.to(dtype), gate.to(dtype)


def only_one(**modes):
    given = [name for name, value in modes.items() if value is not None and value is not False]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]}: each says who sees whom; give one of them")


def context_of(u, weight, mask, frames, cu_seqlens):
    """(weight, mask, offsets, cumulative) as the kernels take them."""
    batch, tokens = u.shape[:2]
    if mask is not None:
        if weight is not None:
            raise ValueError("mask and weight: the mask holds the weights already; give one of them")
        return None, check_weights("mask", mask, (batch, "M", tokens), u), None, False
    if weight is not None:
        weight = check_weights("weight", weight, (batch, tokens), u)
    if frames is not None:
        return weight, None, frame_offsets(frames, tokens, u), True
    if cu_seqlens is not None:
        return weight, None, offsets_tensor("cu_seqlens", cu_seqlens, tokens, u), False
    return weight, None, None, False


def coefficients_of(coeff, u):
    return None if coeff is None else coeff.to(accumulator(u.dtype))


def prior_of(state):
    return (None, None, None) if state is None else (state.total, state.residual, state.count)


def angles_of(rotary):
    return (None, None, 0) if rotary is None else (rotary.cos, rotary.sin, rotary.axes)


def polynomial_state(
    u, coeff=None, *, form, degree, weight=None, mask=None, causal=False, frames=None, cu_seqlens=None, rotary=None,
    state=None,
):  # fmt: skip
    """Sum the polynomial features φ(u) of the context tokens into a State. One pass over u.

    Args:
        u: projected context tokens, float32, float64, bfloat16 or float16, any strides. (B, N, degree * E) in product
            form (arXiv 2411.12663), (B, N, E) in power form (arXiv 2604.06129). The state is as wide, C channels.
        coeff: (E, degree) coefficients of the power form.
        form: "product" or "power".
        degree: 1 to 16.
        weight: (B, N) weight of every token, at least 0.
        mask: (B, M, N) weights of every token for M groups; costs M * N * C, not linear in tokens.
        causal: one group a token, of the tokens up to and with it.
        frames: a frame length, or offsets 0, ..., N; one group a frame, of the frames up to and with it.
        cu_seqlens: offsets 0, ..., N; one group a sequence.
        rotary: `rotary.Rotary` angles by which the features are turned before they are summed (power form).
        state: State with one group, of what came before; added to every group in the same pass.

    Returns:
        State with G groups: 1, M, N, frames or sequences.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. ImportError: nothing compiled.
    """
    _require(u, "u")
    check_features(u, coeff, form, degree)
    only_one(mask=mask, causal=causal, frames=frames, cu_seqlens=cu_seqlens)
    if state is not None:
        only_one(state=state, mask=mask, cu_seqlens=cu_seqlens)
        check_state("state", state, u.shape[0], u.shape[2], u.dtype, u)
    check_rotary("rotary", rotary, u.shape[1], u.shape[2], form, u)
    weight, mask, offsets, cumulative = context_of(u, weight, mask, 1 if causal else frames, cu_seqlens)
    new = torch.ops.pom_ext.state(
        u, coefficients_of(coeff, u), None, None, weight, mask, offsets, cumulative, *prior_of(state),
        *angles_of(rotary), FORMS.index(form), degree,
    )  # fmt: skip
    return State(*new)


def polynomial_readout(gate, state, *, form, n_sel_heads=1, frames=None, cu_seqlens=None, rotary=None):
    """y = γ(gate) ⊙ H: every query token gates the mean features of its group. One pass over the gates.

    Args:
        gate: (B, M, C), or (B, M, n_sel_heads) with one scalar for a head of C / n_sel_heads channels.
        state: State (B, G, C). Queries are dealt to the groups evenly and in order unless offsets are given.
        form: "product" (γ = sigmoid) or "power" (γ = hardsigmoid).
        frames, cu_seqlens: a length, or offsets 0, ..., M: the queries of every group.
        rotary: angles by which the gates are turned (power form).

    Returns:
        (B, M, C) in the dtype of the gates; 0 where a group has no tokens.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. ImportError: nothing compiled.
    """
    _require(gate, "gate")
    if not isinstance(state, State):
        raise TypeError(f"state: expected a State, got {type(state).__name__}")
    groups, channels = state.total.shape[1:]
    check_gate(gate, channels, n_sel_heads, form)
    check_state("state", state, gate.shape[0], channels, gate.dtype, gate, groups)
    check_rotary("rotary", rotary, gate.shape[1], gate.shape[2], form, gate)
    only_one(frames=frames, cu_seqlens=cu_seqlens)
    offsets = query_offsets(gate, groups, frames, cu_seqlens)
    return torch.ops.pom_ext.readout(
        gate, None, state.total, state.residual, None, None, state.count, offsets, *angles_of(rotary),
        FORMS.index(form), n_sel_heads,
    )  # fmt: skip


def query_offsets(queries, groups, frames, cu_seqlens):
    """Offsets of the queries (B, M, ...) of every group; None deals them evenly."""
    count, offsets = queries.shape[1], None
    if frames is not None:
        offsets = frame_offsets(frames, count, queries)
    elif cu_seqlens is not None:
        offsets = offsets_tensor("cu_seqlens", cu_seqlens, count, queries)
    elif (count % groups if groups else count) != 0:
        raise ValueError(f"gate: {count} queries cannot be dealt evenly to {groups} groups; give frames or cu_seqlens")
    if offsets is not None and offsets.shape[0] != groups + 1:
        raise ValueError(f"state: {groups} groups do not match offsets of {offsets.shape[0] - 1} groups")
    return offsets


def polynomial_mix(
    u, gate, coeff=None, *, form, degree, n_sel_heads=1, weight=None, mask=None, causal=False, frames=None,
    cu_seqlens=None, rotary=None, gate_rotary=None, state=None, return_state=False,
):  # fmt: skip
    """State and readout: every query token gates the mean polynomial features of the context it sees.

    Arguments as in `polynomial_state` and `polynomial_readout`. With `causal`, `frames` and `cu_seqlens` the queries
    are the context tokens themselves (M = N); with `mask` query m reads group m. `causal` keeps a running sum and
    stores no state for every token. Under autocast u and gate may differ in dtype: the wider one is taken, and sums are
    kept in float32 whatever it is. Memory beyond inputs and outputs is that of the state, whatever N (on a GPU that of
    a state for every 32 to 512 tokens). A context of up to 1,024 tokens that all queries read is one launch on a GPU.

    Returns:
        y (B, M, C) in the dtype of the gates; with `return_state` also the State (B, 1, C) after the last token.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. ImportError: nothing compiled.
    """
    _require(u, "u")
    check_features(u, coeff, form, degree)
    check_gate(gate, u.shape[2], n_sel_heads, form)
    u, gate = _of_one_dtype(u, gate)
    tokens = u.shape[1]
    aligned = causal or frames is not None or cu_seqlens is not None
    queries = tokens if aligned else mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 3 else "M"
    check_tensor("gate", gate, (u.shape[0], queries, gate.shape[2]), (u.dtype,), u)
    check_rotary("gate_rotary", gate_rotary, gate.shape[1], gate.shape[2], form, gate)
    if return_state:
        only_one(return_state=True, mask=mask, cu_seqlens=cu_seqlens)
    if causal:
        only_one(causal=True, mask=mask, frames=frames, cu_seqlens=cu_seqlens)
        return _causal_mix(u, gate, coeff, form, degree, n_sel_heads, weight, rotary, gate_rotary, state, return_state)
    if mask is None and not aligned:
        return _whole_mix(u, gate, coeff, form, degree, n_sel_heads, weight, rotary, gate_rotary, state, return_state)
    new = polynomial_state(
        u, coeff, form=form, degree=degree, weight=weight, mask=mask, frames=frames, cu_seqlens=cu_seqlens,
        rotary=rotary, state=state,
    )  # fmt: skip
    y = polynomial_readout(
        gate, new, form=form, n_sel_heads=n_sel_heads, frames=frames, cu_seqlens=cu_seqlens, rotary=gate_rotary
    )
    return (y, new.last()) if return_state else y


def _mix_arguments(u, coeff, form, weight, rotary, gate_rotary, state):
    """The arguments of a mix between the gates and the form, checked: coefficients, weights, what came before, angles."""
    if state is not None:
        check_state("state", state, u.shape[0], u.shape[2], u.dtype, u)
    check_rotary("rotary", rotary, u.shape[1], u.shape[2], form, u)
    weight = context_of(u, weight, None, None, None)[0]
    return coefficients_of(coeff, u), weight, prior_of(state), angles_of(rotary), angles_of(gate_rotary)


def _whole_mix(u, gate, coeff, form, degree, n_sel_heads, weight, rotary, gate_rotary, state, return_state):
    coeff, weight, prior, angles, gate_angles = _mix_arguments(u, coeff, form, weight, rotary, gate_rotary, state)
    y, *new = torch.ops.pom_ext.mix(
        u, gate, coeff, weight, *prior, *angles, *gate_angles, FORMS.index(form), degree, n_sel_heads
    )
    return (y, State(*new)) if return_state else y


def _causal_mix(u, gate, coeff, form, degree, n_sel_heads, weight, rotary, gate_rotary, state, return_state):
    coeff, weight, prior, angles, gate_angles = _mix_arguments(u, coeff, form, weight, rotary, gate_rotary, state)
    if (rotary is None) != (gate_rotary is None):
        raise ValueError("rotary and gate_rotary: with causal=True give both or neither")
    cos, sin, axes = angles
    y, *new = torch.ops.pom_ext.causal_mix(
        u, gate, coeff, None, None, None, weight, *prior, cos, sin, *gate_angles[:2], axes, FORMS.index(form), degree,
        n_sel_heads,
    )  # fmt: skip
    return (y, State(*new)) if return_state else y


def polynomial_update(
    u, gate, state, coeff=None, *, form, degree, n_sel_heads=1, weight=None, rotary=None, gate_rotary=None
):
    """One step of a stream: adds the tokens of a frame to a running State, in place, and lets the gates read the sum.

    What `polynomial_mix` gives with `state=state, return_state=True`, but `state.total`, `state.residual` and
    `state.count` are overwritten instead of made anew. On a GPU a frame of up to 1,024 tokens is one launch; the count
    stays on the device, nothing waits, and the call can be captured in a CUDA graph. It has no gradient.

    Args:
        u: (B, N, C) projected tokens of the frame, as in `polynomial_state`.
        gate: (B, M, C) or (B, M, n_sel_heads), as in `polynomial_readout`.
        state: State (B, 1, C) of what came before, contiguous; written last, after y.
        coeff, form, degree, n_sel_heads, weight, rotary, gate_rotary: as in `polynomial_mix`.

    Returns:
        y (B, M, C) in the dtype of the gates.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient; the message names it. ImportError: nothing
            compiled.
    """
    _require(u, "u")
    if not isinstance(state, State):
        raise TypeError(f"state: expected a State, got {type(state).__name__}")
    check_features(u, coeff, form, degree)
    check_gate(gate, u.shape[2], n_sel_heads, form)
    u, gate = _of_one_dtype(u, gate)
    check_tensor("gate", gate, (u.shape[0], "M", gate.shape[2]), (u.dtype,), u)
    check_rotary("gate_rotary", gate_rotary, gate.shape[1], gate.shape[2], form, gate)
    for name, tensor in {"u": u, "gate": gate, "coeff": coeff, "state.total": state.total}.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: an update in place has no gradient, got requires_grad=True; call it under torch.no_grad(), or "
                "polynomial_mix with state=state and return_state=True"
            )
    coeff, weight, prior, angles, gate_angles = _mix_arguments(u, coeff, form, weight, rotary, gate_rotary, state)
    for name, tensor in zip(("total", "residual", "count"), prior):
        if not tensor.is_contiguous():
            raise ValueError(
                f"state.{name}: expected a contiguous tensor, since it is written in place; give state.clone()"
            )
    y = torch.ops.pom_ext.update(
        u, gate, coeff, weight, *prior, state.ticket, *angles, *gate_angles, FORMS.index(form), degree, n_sel_heads
    )
    increment_version(prior)  # a backward pass that needs the old values raises instead of using the new ones
    return y
