"""Past: everything a frame-causal video model remembers of the frames it has seen."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..ops import State
from ..ops.state import FIELDS


class Forgetting(NamedTuple):
    """What a frame sees of those before it. The default forgets nothing.

    window: it sees the `window` - 1 frames before its own and nothing older; 0: all of them.
    decay: with every frame, what came before counts this factor less, 0 to 1.
    """

    window: int = 0
    decay: float = 1.0

    def sums(self, memory, own):
        """What each of T frames sees of those before it, as a State (B, T, C), and the memory after them.

        own: State (B, T, C), the sums of each frame alone.
        memory: State (B, G, C) of the frames before, as the next frame counts them: one sum of all, or with a window
            the sums of the last window - 1, one by one.
        """
        frames, kept = own.count.shape[1], memory.count.shape[1]
        parts = State.cat([memory, own], dim=1)

        def before(parts):  # (B, G + T, ...) -> (B, T + 1, ...)
            if self.window:
                return parts.unfold(1, kept, 1).sum(-1)
            if self.decay == 1:
                return parts.cumsum(dim=1)
            sums = [parts[:, 0]]
            for part in parts[:, 1:].unbind(1):
                sums.append(self.decay * (sums[-1] + part))
            return torch.stack(sums, dim=1)

        # In float64 total and residual are one number. A window is summed anew, not slid: what left it leaves no trace.
        whole = parts.to(torch.float64)
        total = before(whole.total)
        sums = State(total, torch.zeros_like(total), before(whole.count)).to(own.total.dtype)
        seen = sums.map(lambda t: t[:, :frames])
        return seen, (parts if self.window else sums).map(lambda t: t[:, frames:].clone())  # no view on all frames


FORGET_NOTHING = Forgetting()


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
    forgetting: how older frames fade from it.
    """

    frames: int
    height: int
    width: int
    memories: tuple
    tails: tuple = ()
    forgetting: Forgetting = FORGET_NOTHING

    @property
    def nbytes(self):
        """Bytes of the memories and tails."""
        return sum(t.nbytes for memory in self.memories for t in memory.state_dict().values()) + sum(
            tail.nbytes for tail in self.tails
        )

    def clone(self):
        """A copy that shares no memory: a fork of the stream."""
        return self._map(lambda part: part.clone())

    def to(self, device):
        """Moves to a device. dtypes stay: the sums are kept in float32 or float64 whatever the model computes in."""
        device = torch.device(device)
        return self._map(lambda part: part.to(device))

    def _map(self, function):
        memories, tails = (tuple(map(function, parts)) for parts in (self.memories, self.tails))
        return replace(self, memories=memories, tails=tails)

    def state_dict(self):
        """Names and tensors: "seen" (frames, height, width), "forgetting", "{layer}.total" and so on, "{layer}.tail"."""
        tensors = {
            "seen": torch.tensor([self.frames, self.height, self.width]),
            "forgetting": torch.tensor(self.forgetting, dtype=torch.float64),
        }
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

        seen, forgetting, memories, tails = take("seen"), take("forgetting"), [], []
        if seen.shape != (3,):
            raise ValueError(f"tensors: expected 'seen' of shape (3,), frames and patches, got {tuple(seen.shape)}")
        if forgetting.shape != (2,):
            raise ValueError(
                f"tensors: expected 'forgetting' of shape (2,), window and decay, got {tuple(forgetting.shape)}"
            )
        window, decay = forgetting.tolist()
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
        return cls(*seen.tolist(), tuple(memories), tuple(tails), Forgetting(int(window), decay))
