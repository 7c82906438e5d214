"""StreamCache: all that a frame-causal video model keeps of the frames it has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layers.attention import KeyValues
from ..layers.layout import FULL_CONTEXT, ContextWindow
from ..ops import State
from ..ops.state import FIELDS


@dataclass(frozen=True)
class StreamCache:
    """All that a frame-causal model keeps of the frames it has seen: of constant size with polynomial mixers.

    Attributes:
        frames: number of frames seen.
        height, width: patches of a frame.
        mixer_caches: for every layer the `State` of its polynomial mixer, or the `KeyValues` of its attention.
        conv_caches: for every layer the tokens (B, earlier, S, D) of the last 1 or 2 frames, the input of its local
            convolution; None for a layer whose convolution sees no earlier frame; () is None for all layers.
        context_window: which earlier frames a frame sees, and how much they count.
    """

    frames: int
    height: int
    width: int
    mixer_caches: tuple[State | KeyValues, ...]
    conv_caches: tuple[Tensor | None, ...] = ()
    context_window: ContextWindow = FULL_CONTEXT

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of all layers."""
        tensors = [tensor for cache in self.mixer_caches for tensor in cache.state_dict().values()]
        return sum(tensor.nbytes for tensor in (*tensors, *self._tails().values()))

    def clone(self) -> StreamCache:
        """A copy that shares no memory: a fork of the stream."""
        return self._map(lambda part: part.clone())

    def to(self, device: torch.device | str) -> StreamCache:
        """Move to a device. dtypes stay: sums are in float32 or float64 whatever dtype the model computes in."""
        device = torch.device(device)
        return self._map(lambda part: part.to(device))

    def _map(self, function: Callable[[Any], Any]) -> StreamCache:
        mixer_caches = tuple(map(function, self.mixer_caches))
        conv_caches = tuple(None if cache is None else function(cache) for cache in self.conv_caches)
        return replace(self, mixer_caches=mixer_caches, conv_caches=conv_caches)

    def _tails(self) -> dict[str, Tensor]:
        return {f"{layer}.tail": cache for layer, cache in enumerate(self.conv_caches) if cache is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, as files hold them.

        "seen": (frames, height, width); "forgetting": (window, decay); then for every layer "{layer}.total",
        "{layer}.residual" and "{layer}.count", or "{layer}.keys" and "{layer}.values"; then "{layer}.tail", the cache
        of the local convolution, of the layers that have one.
        """
        tensors = {
            "seen": torch.tensor([self.frames, self.height, self.width]),
            "forgetting": torch.tensor(self.context_window, dtype=torch.float64),
        }
        for layer, cache in enumerate(self.mixer_caches):
            tensors |= {f"{layer}.{name}": tensor for name, tensor in cache.state_dict().items()}
        return tensors | self._tails()

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> StreamCache:
        """The inverse of `state_dict`.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        remaining = dict(tensors)

        def take(name: str) -> Tensor:
            if name not in remaining:
                raise ValueError(f"tensors: missing {name!r}; got {', '.join(sorted(tensors)) or 'nothing'}")
            return remaining.pop(name)

        seen, forgetting = take("seen"), take("forgetting")
        if seen.shape != (3,):
            raise ValueError(f"tensors: expected 'seen' of shape (3,), frames and patches, got {tuple(seen.shape)}")
        if forgetting.shape != (2,):
            raise ValueError(
                f"tensors: expected 'forgetting' of shape (2,), window and decay, got {tuple(forgetting.shape)}"
            )
        frames, height, width = seen.tolist()
        window, decay = forgetting.tolist()
        mixer_caches, conv_caches = [], []
        while any(name.startswith(f"{len(mixer_caches)}.") for name in remaining):
            layer = len(mixer_caches)
            if f"{layer}.keys" in remaining:
                mixer_caches.append(KeyValues(*(take(f"{layer}.{name}") for name in KeyValues._fields)))
            else:
                mixer_caches.append(State.from_state_dict({name: take(f"{layer}.{name}") for name in FIELDS}))
            conv_caches.append(remaining.pop(f"{layer}.tail", None))
        if remaining:
            raise ValueError(
                f"tensors: expected those of {len(mixer_caches)} layers, got beside them {', '.join(sorted(remaining))}"
            )
        context_window = ContextWindow(int(window), decay)
        return cls(frames, height, width, tuple(mixer_caches), tuple(conv_caches), context_window)
