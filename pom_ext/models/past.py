"""Past: everything a frame-causal video model remembers of the frames it has seen."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..state import FIELDS, State


class KeyValues(NamedTuple):
    """The memory of attention: keys and values (B, N, D) of every token so far. It grows with every frame."""

    keys: torch.Tensor
    values: torch.Tensor

    def clone(self):
        return KeyValues(self.keys.clone(), self.values.clone())

    def to(self, device):
        return KeyValues(self.keys.to(device), self.values.to(device))

    def state_dict(self):
        return self._asdict()


@dataclass(frozen=True)
class Past:
    """All that a frame-causal model remembers of the frames it has seen: with polynomial mixers of constant size.

    frames: number of frames seen.
    height, width: patches of a frame.
    memories: for every layer the `State` of its polynomial mixer, or the `KeyValues` of its attention.
    tails: for every layer the (B, 2, S, D) tokens of the last two frames, as its local convolution takes them; empty
        in a model without.
    """

    frames: int
    height: int
    width: int
    memories: tuple
    tails: tuple = ()

    def clone(self):
        """A copy that shares no memory: a fork of the stream."""
        return self._map(lambda part: part.clone())

    def to(self, device):
        """Moves to a device. dtypes stay: the sums are kept in float32 or float64 whatever the model computes in."""
        device = torch.device(device)
        return self._map(lambda part: part.to(device))

    def _map(self, function):
        memories, tails = (tuple(map(function, parts)) for parts in (self.memories, self.tails))
        return Past(self.frames, self.height, self.width, memories, tails)

    def state_dict(self):
        """Names and tensors: "seen" (frames, height, width), "{layer}.total" and so on, "{layer}.tail"."""
        tensors = {"seen": torch.tensor([self.frames, self.height, self.width])}
        for layer, memory in enumerate(self.memories):
            tensors |= {f"{layer}.{name}": tensor for name, tensor in memory.state_dict().items()}
        return tensors | {f"{layer}.tail": tail for layer, tail in enumerate(self.tails)}

    @classmethod
    def from_state_dict(cls, tensors):
        """The inverse of `state_dict`; ValueError where a tensor is missing or left over."""
        rest = dict(tensors)

        def take(name):
            if name not in rest:
                raise ValueError(f"tensors: missing {name!r}; got {', '.join(sorted(tensors)) or 'nothing'}")
            return rest.pop(name)

        seen, memories, tails = take("seen"), [], []
        if seen.shape != (3,):
            raise ValueError(f"tensors: expected 'seen' of shape (3,), frames and patches, got {tuple(seen.shape)}")
        while any(name.startswith(f"{len(memories)}.") for name in rest):
            layer = len(memories)
            if f"{layer}.keys" in rest:
                memories.append(KeyValues(*(take(f"{layer}.{name}") for name in KeyValues._fields)))
            else:
                memories.append(State.from_state_dict({name: take(f"{layer}.{name}") for name in FIELDS}))
            if f"{layer}.tail" in rest:
                tails.append(take(f"{layer}.tail"))
        if rest or len(tails) not in (0, len(memories)):
            raise ValueError(
                f"tensors: expected {len(memories)} layers, all or none of them with a tail, got {len(tails)} tails"
                + (f" and beside them {', '.join(sorted(rest))}" if rest else "")
            )
        return cls(*seen.tolist(), tuple(memories), tuple(tails))
