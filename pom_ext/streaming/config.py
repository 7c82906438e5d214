"""StreamConfig: how a stream draws its frames."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..diffusion.context import check_context


@dataclass(frozen=True)
class StreamConfig:
    """How a `VideoStream` draws its frames; its file keeps these settings.

    Attributes:
        context: what a frame sees of the frames before it. "clean": the finished frames, in one cache. "shared": their
            noise at the same evaluation of the model, in a cache for each evaluation; drawing frame after frame is then
            the same as drawing all frames together, to rounding. It must be what the model was trained with.
        context_noise: for clean context, the noise with which a finished frame enters the cache, as a share of 1000.
            Above 0 its details count less, and the model corrects them by what it knows of the data: a long stream
            drifts less. Not more than the model was trained with (`video_loss`).
        steps: of the solver.
        solver: "euler" calls the model once per step, "heun" twice; for noise prediction "euler" is DDIM.
        guidance: classifier-free guidance, see `diffusion.guidance`; 1 is none, others draw each video twice, with its
            conditions and without, and keep a cache of both.
        seed: the noise of frame f of video i depends on the seed, i and f alone.

    Raises:
        ValueError: an unknown context, or a context_noise out of range.
    """

    context: str = "clean"
    context_noise: float = 0.0
    steps: int = 8
    solver: str = "euler"
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_context(self.context)
        if not 0 <= self.context_noise < 1 or (self.context_noise and self.context != "clean"):
            raise ValueError(
                f"context_noise: expected at least 0 and less than 1, with context='clean', got {self.context_noise}"
            )


def with_settings(init: Callable[..., Any]) -> Callable[..., Any]:
    """Show the fields of `StreamConfig` in the signature of a function in place of its **options."""
    own, settings = inspect.signature(init), inspect.signature(StreamConfig)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [p.replace(kind=p.KEYWORD_ONLY) for p in settings.parameters.values()]
    init.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
    return init


StreamConfig.__init__.__qualname__ = "VideoStream.__init__"  # whose arguments these are, if one is unknown
