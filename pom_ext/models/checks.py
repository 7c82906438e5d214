"""Checks of arguments that the models share. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.checks import under_autocast


def check_at_least(arguments: dict[str, Any], least: dict[str, int]) -> None:
    """ValueError unless every argument named in `least` is an integer, and at least that."""
    for name, low in least.items():
        if not isinstance(arguments[name], int) or arguments[name] < low:
            raise ValueError(f"{name}: expected an integer of at least {low}, got {arguments[name]!r}")


def check_integers(name: str, value: Any, count: int) -> list[int]:
    """`value` as a list; ValueError unless it is a list or tuple of `count` positive integers."""
    numbers = list(value) if isinstance(value, (tuple, list)) else []
    if len(numbers) != count or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(f"{name}: expected {count} positive integers, got {value}")
    return numbers


def check_blocks(space_groups: int, height: int, width: int) -> None:
    """ValueError unless blocks of space_groups x space_groups patches cover a frame of height x width patches."""
    if height % space_groups or width % space_groups:
        raise ValueError(
            f"space_groups: expected a divisor of the patches of a frame, {height} x {width}, got {space_groups}"
        )


def check_placed(weight: Tensor, **inputs: Tensor | None) -> None:
    """TypeError or ValueError unless every input is None or a tensor on the device of the model's weight."""
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as the model, got {tensor.device}")


def check_dtype(weight: Tensor, **inputs: Tensor | None) -> None:
    """TypeError unless every input is None, has the dtype of the model's weight, or is cast by autocast."""
    for name, tensor in inputs.items():
        if tensor is not None and tensor.dtype != weight.dtype and not under_autocast(weight):
            raise TypeError(f"{name}: expected {weight.dtype} as the model, got {tensor.dtype}; use .to() on either")


def check_labels(labels: Tensor, n_classes: int) -> None:
    """TypeError or ValueError unless labels are integers from 0 to n_classes.

    The range is checked on the CPU only: reading it back from a GPU would make the CPU wait for the GPU.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
    readable = labels.device.type == "cpu" and type(labels) is torch.Tensor and not torch.compiler.is_compiling()
    if readable and labels.numel():
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high > n_classes:
            raise ValueError(f"labels: expected 0 to {n_classes} (no class), got values from {low} to {high}")
