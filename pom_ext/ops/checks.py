"""What is wrong with an argument, said before anything is computed: the name, what was expected, what was given."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .rotary import Rotary

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMS = ("product", "power")
MAX_HEADS = 1024


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast chooses dtypes where the tensor is. Of the meta device torch cannot even be asked."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def is_integer(value: Any) -> bool:
    """Whether this is an int, or the SymInt that torch has in its place while it traces; True and False are none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_form(form: str, degree: int = 1) -> None:
    """ValueError unless this is a form, and a degree from 1 to 16."""
    if form not in FORMS:
        raise ValueError(f"form: expected 'product' or 'power', got {form!r}")
    if not is_integer(degree) or not 1 <= degree <= 16:
        raise ValueError(f"degree: expected an integer from 1 to 16, got {degree!r}")


def check_tensor(name: str, tensor: Any, shape: tuple, dtypes: tuple = FLOATS, like: Tensor | None = None) -> None:
    """TypeError or ValueError unless this is a tensor of that shape, one of the dtypes, and on the device of `like`.

    shape: a size, or a letter for any size, for every dimension. dtypes: empty allows all.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape == shape and tensor.dtype in dtypes and (like is None or tensor.device == like.device):
        return  # sizes alone, which is most calls
    if dtypes and tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    for wanted, size in zip(shape, sizes):  # a loop, which takes half the time of any()
        if wanted != size and isinstance(wanted, int):
            fits = False
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(sizes)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")


def check_features(u: Tensor, coeff: Tensor | None, form: str, degree: int) -> None:
    """TypeError or ValueError unless u (B, N, C) and coeff (C, degree), None in product form, go with the form."""
    check_form(form, degree)
    check_tensor("u", u, ("B", "N", "C"))
    channels = u.shape[2]
    if form == "product":
        if coeff is not None:
            raise ValueError("coeff: the product form has no coefficients; expected None")
        if channels == 0 or channels % degree:
            raise ValueError(f"u: expected a multiple of degree={degree} channels, got shape {tuple(u.shape)}")
    else:
        if channels == 0:
            raise ValueError(f"u: expected at least one channel, got shape {tuple(u.shape)}")
        if coeff is None:
            raise ValueError(f"coeff: the power form needs coefficients of shape ({channels}, {degree}), got None")
        check_tensor("coeff", coeff, (channels, degree), like=u)


def check_weights(name: str, weights: Tensor, shape: tuple, like: Tensor) -> Tensor:
    """Weights or mask as the kernels read them: constants, not negative, in the accumulator's dtype."""
    check_tensor(name, weights, shape, dtypes=(), like=like)
    if weights.is_complex():
        raise TypeError(f"{name}: expected real numbers or booleans, got {weights.dtype}")
    if weights.requires_grad:
        raise ValueError(f"{name}: no gradient is defined for it; expected requires_grad=False, pass {name}.detach()")
    # The values of a traced tensor are not known, and looking at a GPU's would wait for it.
    readable = weights.device.type == "cpu" and not torch.compiler.is_compiling() and type(weights) is torch.Tensor
    if readable and weights.dtype != torch.bool and weights.numel() and bool((weights < 0).any()):
        raise ValueError(f"{name}: expected no negative weight, got {weights.min().item()}")
    return weights.to(accumulator(like.dtype)).contiguous()


def offsets_tensor(name: str, offsets: Any, tokens: int, like: Tensor) -> Tensor:
    """Offsets 0, ..., tokens as an int64 tensor on the device of `like`."""
    if isinstance(offsets, torch.Tensor):
        if offsets.dim() != 1 or offsets.is_floating_point() or offsets.dtype == torch.bool or offsets.numel() == 0:
            raise ValueError(
                f"{name}: expected integer offsets 0, ..., {tokens} in one dimension, "
                f"got {tuple(offsets.shape)} {offsets.dtype}"
            )
        if offsets.device.type != "cpu" or torch.compiler.is_compiling() or type(offsets) is not torch.Tensor:
            return offsets.to(like.device, torch.int64)
        values = offsets.tolist()
    else:
        if not isinstance(offsets, (list, tuple)) or not all(map(is_integer, offsets)):
            raise TypeError(f"{name}: expected integer offsets 0, ..., {tokens} as a list or tensor, got {offsets!r}")
        values = list(offsets)
    if not values or values[0] != 0 or values[-1] != tokens:
        raise ValueError(f"{name}: expected offsets from 0 to {tokens}, the number of context tokens, got {values}")
    if any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name}: expected offsets that never decrease, got {values}")
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def frame_offsets(frames: Any, tokens: int, like: Tensor) -> Tensor:
    """Offsets of frames, from a frame length or from offsets. No frames are one frame without tokens."""
    if is_integer(frames):
        if frames < 1 or tokens % frames:
            raise ValueError(f"frames: expected a frame length that divides the {tokens} context tokens, got {frames}")
        offsets = torch.arange(0, tokens + 1, frames, dtype=torch.int64, device=like.device)
    else:
        offsets = offsets_tensor("frames", frames, tokens, like)
    return offsets if offsets.shape[0] > 1 else offsets.repeat(2)


def check_heads(n_sel_heads: int, channels: int) -> None:
    if not is_integer(n_sel_heads) or n_sel_heads < 1 or channels % n_sel_heads or n_sel_heads > MAX_HEADS:
        raise ValueError(
            f"n_sel_heads: expected a divisor of the state width {channels}, at most {MAX_HEADS}, got {n_sel_heads!r}"
        )


def check_rotary(name: str, rotary: Any, tokens: int, channels: int, form: str, like: Tensor) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"{name}: expected a pom_ext.ops.Rotary, got {type(rotary).__name__}")
    if form != "power":
        raise ValueError(f"{name}: rotary positions are defined for form='power' only, got form={form!r}")
    for part in ("cos", "sin"):
        check_tensor(f"{name}.{part}", getattr(rotary, part), (tokens, "axes * half"), (accumulator(like.dtype),), like)
    pairs = rotary.cos.shape[1]
    if pairs != rotary.sin.shape[1] or rotary.axes < 1 or pairs % rotary.axes or not 0 < 2 * pairs <= channels:
        raise ValueError(
            f"{name}: expected cos and sin with axes * half columns, at most {channels // 2}, "
            f"got {tuple(rotary.cos.shape)}, {tuple(rotary.sin.shape)} and axes={rotary.axes}"
        )


def check_state(name: str, state: Any, shape: tuple, dtype: torch.dtype, like: Tensor) -> None:
    """TypeError or ValueError unless this is a State (B, G, C) for tokens of that dtype, on the device of `like`."""
    from .state import State

    if not isinstance(state, State):
        raise TypeError(f"{name}: expected a State, got {type(state).__name__}")
    dtype = accumulator(dtype)
    check_tensor(f"{name}.total", state.total, shape, (dtype,), like)
    check_tensor(f"{name}.residual", state.residual, shape, (dtype,), like)
    check_tensor(f"{name}.count", state.count, shape[:2], (torch.float64,), like)
