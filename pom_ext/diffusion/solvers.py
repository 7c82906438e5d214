"""Solvers: from noise to data along the path that a network has learned, for images and frames alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .objectives import Objective

SOLVERS = ("euler", "heun")


def integrate(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], solver: str = "euler"
) -> Tensor:
    """Follow dx/dt = velocity(x, t) through `times` and return x at the last of them.

    "euler" evaluates the velocity once per step and is of order 1, "heun" twice and of order 2. All arithmetic is in
    the dtype of x (the flow-matching schedulers of diffusers, otherwise the same, go through float32).

    Args:
        velocity: velocity(x (B, ...), t) -> (B, ...), t a number in the unit of `times`.
        x: (B, ...), at the first of the times.
        times: at least one; `flow_times` gives them from 1 (noise) to 0 (data).
        solver: "euler" or "heun".

    Returns:
        (B, ...), in the dtype of x.
    """
    for now, after in itertools.pairwise(times):
        slope = velocity(x, now)
        if solver == "heun":
            slope = (slope + velocity(x + (after - now) * slope, after)) / 2
        x = x + (after - now) * slope
    return x


def num_function_evals(steps: int, solver: str) -> int:
    """How often `Objective.denoise` calls the network."""
    return 2 * steps if solver == "heun" else steps


def check_solver(objective: Objective, steps: int, guidance: float, solver: str) -> None:
    """Raise ValueError unless `objective` can be sampled with these arguments."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance: expected a number of at least 0, got {guidance}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {list(SOLVERS)}, got {solver!r}")
    for reason in objective.supports(solver=solver, guidance=guidance):
        raise ValueError(reason)
