"""The compiled operations as functions: polynomial state, readout, and both in one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _library
from .arguments import Frames, Gate, Polynomial, Visibility, call, check_mutually_exclusive, query_offsets
from .checks import FLOATS, FORMS, check_form, check_state, under_autocast
from .rotary import Rotary
from .state import State

if _library.ERROR is None:
    from ._register import register

    try:
        register()
    except Exception as error:  # noqa: BLE001 -- an operation that is missing, or takes other arguments
        _library.ERROR = (
            f"pom_ext: the compiled library was built before this source ({error}). Build it again: {_library.BUILD}"
        )


def _require(tensor: Tensor, name: str) -> None:
    """ImportError or ValueError unless there is a compiled library with kernels for the device of the tensor."""
    _library.load()
    device = tensor.device.type if isinstance(tensor, torch.Tensor) else "cpu"
    if device != "cpu" and device not in (*_library.DEVICES, "meta"):
        served = " and ".join(_library.DEVICES)
        remedy = "move it there"
        if device == "cuda":
            remedy += f", or build for this GPU, in the source folder and with nvcc on the path: {_library.BUILD_CUDA}"
        raise ValueError(
            f"{name}: this library has kernels for tensors on {served} only, got one on {tensor.device}; {remedy}"
        )


def _promote_under_autocast(u: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast both in the wider dtype of the two, as torch does it for its operations of several tensors."""
    if u.dtype == gate.dtype or gate.dtype not in FLOATS or not under_autocast(u):
        return u, gate
    dtype = torch.promote_types(u.dtype, gate.dtype)
    return u.to(dtype), gate.to(dtype)


def _prior(state: State | None, u: Tensor) -> dict:
    """The arguments of an operation that adds to a state of one group, checked."""
    if state is None:
        return {}
    check_state("state", state, (u.shape[0], 1, u.shape[2]), u.dtype, u)
    return state.to_kernel()


def polynomial_state(
    u: Tensor,
    coeff: Tensor | None = None,
    *,
    form: str,
    degree: int,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    frames: Frames | None = None,
    cu_seqlens: Frames | None = None,
    rotary: Rotary | None = None,
    state: State | None = None,
) -> State:
    """Sum the polynomial features φ(u) of the context tokens into a State. One pass over u.

    Args:
        u: projected context tokens, float32, float64, bfloat16 or float16, any strides. (B, N, degree * E) in product
            form (arXiv 2411.12663), (B, N, E) in power form (arXiv 2604.06129). The state is as wide, C channels.
        coeff: (E, degree) coefficients of the power form.
        form: "product" or "power".
        degree: 1 to 16.
        weight: (B, N) weight of every token, at least 0.
        mask: (B, M, N) weights of every token for M groups; costs M * N * C, not linear in tokens.
        causal: one group for each token: that token and those before it.
        frames: a frame length, or offsets 0, ..., N; one group for each frame: that frame and those before it.
        cu_seqlens: offsets 0, ..., N; one group for each sequence.
        rotary: `Rotary` angles by which the features are rotated before they are summed (power form).
        state: State (B, 1, C) of earlier tokens; added to every group in the same pass.

    Returns:
        State with G groups: 1, M, N, frames or sequences.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. ImportError: there is no compiled
            library.
    """
    _require(u, "u")
    polynomial = Polynomial(form, degree, coeff, rotary)
    polynomial.check(u)
    visibility = Visibility.of(u, weight=weight, mask=mask, causal=causal, frames=frames, cu_seqlens=cu_seqlens)
    if state is not None:
        check_mutually_exclusive(state=state, mask=mask, cu_seqlens=cu_seqlens)
    prior = _prior(state, u)
    return State(*call("state", polynomial.to_kernel(u.dtype), visibility.to_kernel(), prior, u=u))


def polynomial_readout(
    gate: Tensor,
    state: State,
    *,
    form: str,
    n_sel_heads: int = 1,
    frames: Frames | None = None,
    cu_seqlens: Frames | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """y = γ(gate) ⊙ H: every query token gates the mean features of its group. One pass over the gates.

    Args:
        gate: (B, M, C), or (B, M, n_sel_heads) with one scalar for a head of C / n_sel_heads channels.
        state: State (B, G, C). Queries are divided among the groups evenly and in order unless offsets are given.
        form: "product" (γ = sigmoid) or "power" (γ = hardsigmoid).
        frames, cu_seqlens: a length, or offsets 0, ..., M: the queries of every group.
        rotary: angles by which the gates are rotated (power form).

    Returns:
        (B, M, C) in the dtype of the gates; 0 where a group has no tokens.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. ImportError: there is no compiled
            library.
    """
    _require(gate, "gate")
    if not isinstance(state, State):
        raise TypeError(f"state: expected a State, got {type(state).__name__}")
    groups, channels = state.total.shape[1:]
    reading = Gate(gate, n_sel_heads, rotary)
    check_form(form)
    reading.check(("B", "M", channels))
    check_state("state", state, (gate.shape[0], groups, channels), gate.dtype, gate)
    reading.check_rotary("rotary", form)
    offsets = query_offsets(gate, groups, frames, cu_seqlens)
    return call("readout", reading.to_kernel(), state.to_kernel(), form=FORMS.index(form), offsets=offsets)


def polynomial_mix(
    u: Tensor,
    gate: Tensor,
    coeff: Tensor | None = None,
    *,
    form: str,
    degree: int,
    n_sel_heads: int = 1,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    frames: Frames | None = None,
    cu_seqlens: Frames | None = None,
    rotary: Rotary | None = None,
    gate_rotary: Rotary | None = None,
    state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """State and readout: every query token gates the mean polynomial features of the context it sees.

    Arguments as in `polynomial_state` and `polynomial_readout`. With `causal`, `frames` and `cu_seqlens` the queries
    are the context tokens themselves (M = N); with `mask` query m reads group m. `causal` keeps a running sum and
    stores no state for every token. Under autocast u and gate may differ in dtype: the wider one is taken, and sums are
    kept in float32 whatever it is. Memory beyond inputs and outputs is that of the state, whatever N (on a GPU that of
    a state for every 32 to 512 tokens). A context of up to 1,024 tokens that all queries read is one launch on a GPU.

    Returns:
        y (B, M, C) in the dtype of the gates; with `return_state` also the State (B, 1, C) after the last token.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. ImportError: there is no compiled
            library.
    """
    polynomial = Polynomial(form, degree, coeff, rotary)
    aligned = causal or frames is not None or cu_seqlens is not None
    queries = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 3 else "M"
    u, reading = _check_mix(u, Gate(gate, n_sel_heads, gate_rotary), polynomial, None if aligned else queries)
    if causal:
        check_mutually_exclusive(causal=True, mask=mask, frames=frames, cu_seqlens=cu_seqlens)
    groups = {} if causal else {"mask": mask, "frames": frames, "cu_seqlens": cu_seqlens}
    visibility = Visibility.of(u, weight=weight, **groups)
    if return_state:
        check_mutually_exclusive(return_state=True, mask=mask, cu_seqlens=cu_seqlens)
    if state is not None:
        check_mutually_exclusive(state=state, mask=mask, cu_seqlens=cu_seqlens)
    tokens = ({"u": u}, polynomial.to_kernel(u.dtype), visibility.to_kernel(), _prior(state, u))
    if causal or (mask is None and not aligned):
        if causal and (rotary is None) != (gate_rotary is None):
            raise ValueError("rotary and gate_rotary: with causal=True give both or neither")
        if causal and rotary is not None and gate_rotary is not None and rotary.axes != gate_rotary.axes:
            raise ValueError(
                f"gate_rotary: expected axes={rotary.axes} as rotary, with causal=True, got {gate_rotary.axes}"
            )
        y, *parts = call("causal_mix" if causal else "mix", *tokens, reading.to_kernel())
        return (y, State(*parts)) if return_state else y
    new = State(*call("state", *tokens))
    y = call("readout", reading.to_kernel(), new.to_kernel(), form=FORMS.index(form), offsets=visibility.offsets)
    return (y, new.last()) if return_state else y


def _check_mix(u: Tensor, reading: Gate, polynomial: Polynomial, queries: int | str | None) -> tuple[Tensor, Gate]:
    """The tokens and gates of a mix, checked and of one dtype. queries: how many; None is one for every token."""
    _require(u, "u")
    polynomial.check(u)
    if isinstance(reading.values, torch.Tensor):
        u, gate = _promote_under_autocast(u, reading.values)
        reading = Gate(gate, reading.n_heads, reading.rotary)
    batch, tokens, channels = u.shape
    reading.check((batch, tokens if queries is None else queries, channels), (u.dtype,), u)
    reading.check_rotary("gate_rotary", polynomial.form)
    return u, reading


def polynomial_update(
    u: Tensor,
    gate: Tensor,
    state: State,
    coeff: Tensor | None = None,
    *,
    form: str,
    degree: int,
    n_sel_heads: int = 1,
    weight: Tensor | None = None,
    rotary: Rotary | None = None,
    gate_rotary: Rotary | None = None,
) -> Tensor:
    """One step of a stream: adds the tokens of a frame to a running State, in place, and reads the sum.

    Returns what `polynomial_mix(..., state=state, return_state=True)` does, but overwrites `state.total`,
    `state.residual` and `state.count`. On a GPU a frame of up to 1,024 tokens is one launch; the count
    stays on the device, nothing waits, and the call can be captured in a CUDA graph. It has no gradient.

    Args:
        u: (B, N, C) projected tokens of the frame, as in `polynomial_state`.
        gate: (B, M, C) or (B, M, n_sel_heads), as in `polynomial_readout`.
        state: State (B, 1, C) of the tokens before, contiguous; written last, after y.
        coeff, form, degree, n_sel_heads, weight, rotary, gate_rotary: as in `polynomial_mix`.

    Returns:
        y (B, M, C) in the dtype of the gates.

    Raises:
        ValueError, TypeError: an argument is wrong, or requires a gradient; the message names it. ImportError: there is
            no compiled library.
    """
    polynomial = Polynomial(form, degree, coeff, rotary)
    u, reading = _check_mix(u, Gate(gate, n_sel_heads, gate_rotary), polynomial, "M")
    check_state("state", state, (u.shape[0], 1, u.shape[2]), u.dtype, u)
    if torch.is_grad_enabled():
        for name, tensor in {"u": u, "gate": reading.values, "coeff": coeff, "state.total": state.total}.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name}: an update in place has no gradient, got requires_grad=True; call it under "
                    "torch.no_grad(), or polynomial_mix with state=state and return_state=True"
                )
    visibility, prior = Visibility.of(u, weight=weight), state.to_kernel()
    for name, tensor in prior.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"state.{name}: expected a contiguous tensor, since it is written in place; give state.clone()"
            )
    tokens = ({"u": u}, polynomial.to_kernel(u.dtype), visibility.to_kernel(), prior)
    y = call("update", *tokens, reading.to_kernel(), arrival_counter=state.arrival_counter)
    # A backward pass that needs the old values raises instead of using the new ones.
    increment_version(list(prior.values()))
    return y
