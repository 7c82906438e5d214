"""State: the sum of features that a polynomial mixer keeps of the tokens it has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

FIELDS = ("total", "residual", "count")


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what rounding lost, exactly (Knuth, TAOCP 4.2.2)."""
    total = a + b
    b_part = total - a
    lost = (a - (total - b_part)) + (b - b_part)
    return total, torch.where(torch.isfinite(total), lost, 0)


@dataclass(frozen=True)
class State:
    """The weighted sum of the features of the tokens seen, and their count.

    States add: the state of a ++ b is the state of a plus the state of b, however long the stream.

    total: (B, G, C) float32 (float64 for float64 inputs), the sum.
    residual: (B, G, C), what `total` cannot hold: the sum is total + residual.
    count: (B, G) float64, number of tokens or sum of their weights. Of a state that fades (`then`) (B, G, R): each of
        R equal parts of the channels fades at its own rate, and so does its count.
    """

    total: Tensor
    residual: Tensor
    count: Tensor
    _arrival_counter: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def arrival_counter(self) -> Tensor:
        """(B,) int32 zeros, with which a GPU kernel that updates this state in place finds the last of its blocks.

        Made at the first use, shared with no other state, and zero again after every update.
        """
        counter = self._arrival_counter
        if counter is None:
            counter = torch.zeros(self.total.shape[0], dtype=torch.int32, device=self.total.device)
            object.__setattr__(self, "_arrival_counter", counter)
        return counter

    @classmethod
    def empty(
        cls,
        batch: int,
        width: int,
        groups: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> State:
        """The state of no tokens: zeros total and residual (B, G, C), and count (B, G) float64.

        Args:
            batch: B.
            width: C channels: E in power form, degree * E in product form.
            groups: G.
            dtype: of total and residual: float32, or float64 for a stream of float64 tokens.
            device: as for torch.zeros.
        """
        total = torch.zeros(batch, groups, width, dtype=dtype, device=device)
        return cls(total, torch.zeros_like(total), torch.zeros(batch, groups, dtype=torch.float64, device=device))

    def merge(self, other: State) -> State:
        """The state of the tokens of both. One group on either side is added to every group of the other.

        Raises:
            TypeError: `other` is no State.
            ValueError: the states have different batch, width, dtype or device, or groups that do not go together, or
                one of them fades.
        """
        if not isinstance(other, State):
            raise TypeError(f"other: expected a State, got {type(other).__name__}")
        if self.fades or other.fades:
            raise ValueError(
                "other: a state that fades does not add, since the order of the tokens matters; use "
                "earlier.then(later, fade)"
            )
        return self._plus(other, "other")

    def _plus(self, other: State, name: str) -> State:
        a, b = self.total, other.total
        groups_agree = a.shape[1] == b.shape[1] or 1 in (a.shape[1], b.shape[1])
        if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2] or not groups_agree:
            raise ValueError(
                f"{name}: states of shape {tuple(a.shape)} and {tuple(b.shape)} do not add; batch and width must "
                "be equal, groups equal or one"
            )
        if a.dtype != b.dtype or a.device != b.device:
            raise ValueError(
                f"{name}: expected a state in {a.dtype} on {a.device}, got {b.dtype} on {b.device}; move it with .to()"
            )
        total, lost = two_sum(a, b)
        total, residual = two_sum(total, lost + (self.residual + other.residual))
        return State(total, residual, self.count + other.count)

    __add__ = merge

    @property
    def fades(self) -> bool:
        """Whether parts of the channels have counts of their own."""
        return self.count.dim() == 3

    def fading(self, parts: int) -> State:
        """The same state with a count for each of `parts` equal parts of the channels."""
        return self if self.fades else replace(self, count=self.count[..., None].expand(-1, -1, parts))

    def then(self, later: State, fade: Tensor) -> State:
        """The state after the tokens of `later`, of which this one, the earlier, has faded: fade ⊙ earlier + later.

        Args:
            later: State of as many groups, or one of the two has one.
            fade: (R,) or (B, G, R), the share of the earlier sums and counts that is left, 0 to 1, of each of R equal
                parts of the channels.

        Raises:
            TypeError: `later` is no State, or `fade` no tensor.
            ValueError: R does not divide the channels, or the states do not go together.
        """
        if not isinstance(later, State):
            raise TypeError(f"later: expected a State, got {type(later).__name__}")
        if not isinstance(fade, Tensor):
            raise TypeError(f"fade: expected a tensor, got {type(fade).__name__}")
        width, parts = self.total.shape[2], fade.shape[-1] if fade.dim() in (1, 3) else 0
        if not parts or width % parts or {state.count.shape[-1] for state in (self, later) if state.fades} - {parts}:
            raise ValueError(
                f"fade: expected a factor for each of R equal parts of {width} channels, as the states have them, "
                f"got shape {tuple(fade.shape)}"
            )
        left = fade.to(torch.float64)
        exact = (self.total.double() + self.residual.double()) * left.repeat_interleave(width // parts, dim=-1)
        earlier = State(exact, torch.zeros_like(exact), self.fading(parts).count * left).to(self.total.dtype)
        return earlier._plus(later.fading(parts), "later")

    def mean(self) -> Tensor:
        """H = (total + residual) / count, (B, G, C); 0 where the count is 0."""
        count, exact = self.count[..., None], torch.add(self.total.double(), self.residual)
        if self.fades:
            exact = exact.unflatten(2, (count.shape[2], -1))  # (B, G, R, C / R)
        none = count == 0
        mean = (exact / (count + none)).masked_fill(none, 0)
        return mean.to(self.total.dtype).view(self.total.shape)

    def last(self) -> State:
        """The last group alone: with frames, everything seen up to the end."""
        return self.map(lambda t: t[:, -1:])

    def clone(self) -> State:
        """A copy that shares no memory: a fork of the stream."""
        return self.map(lambda t: t.clone(memory_format=torch.contiguous_format))

    def detach(self) -> State:
        """The same tensors without their gradient history."""
        return self.map(torch.detach)

    def to(self, target: torch.dtype | torch.device | str) -> State:
        """Moves to a device, or changes total and residual to a dtype (the count stays float64)."""
        if isinstance(target, torch.dtype):
            total = (self.total.double() + self.residual.double()).to(target)
            rest = (self.total.double() - total.double()) + self.residual.double()
            return State(total, rest.to(target), self.count.clone())
        return self.map(lambda t: t.to(target))

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The State of function(total), function(residual) and function(count), such as a slice of the groups."""
        return State(*(function(getattr(self, name)) for name in FIELDS))

    @classmethod
    def cat(cls, states: Sequence[State], dim: int) -> State:
        """States side by side: dim 0 along the batch, 1 along the groups."""
        return cls(*(torch.cat([getattr(state, name) for state in states], dim) for name in FIELDS))

    def split(self, groups: Sequence[int]) -> list[State]:
        """The inverse of `cat` along the groups: states of so many groups each."""
        pieces = (getattr(self, name).split(list(groups), dim=1) for name in FIELDS)
        return [State(*piece) for piece in zip(*pieces, strict=True)]

    def sum_groups(self, size: int) -> State:
        """The sums of every `size` groups in a row: (B, G / size, C)."""
        exact = (self.total.double() + self.residual.double()).unflatten(1, (-1, size)).sum(2)
        return State(exact, torch.zeros_like(exact), self.count.unflatten(1, (-1, size)).sum(2)).to(self.total.dtype)

    def to_kernel(self) -> dict[str, Tensor]:
        """The tensors by name: total, residual and count, as files hold them and operations take them."""
        return {"total": self.total, "residual": self.residual, "count": self.count}

    state_dict = to_kernel

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> State:
        """The inverse of `state_dict`; ValueError if a tensor is missing or the shapes do not belong together."""
        if set(tensors) != set(FIELDS):
            raise ValueError(f"tensors: expected {', '.join(FIELDS)}, got {', '.join(sorted(tensors)) or 'nothing'}")
        state = cls(**tensors)
        shapes = {name: tuple(tensors[name].shape) for name in FIELDS}
        total, count = shapes["total"], shapes["count"]
        faded = len(total) == len(count) == 3 and count[2] > 0 and total[2] % count[2] == 0
        if len(total) != 3 or shapes["residual"] != total or count[:2] != total[:2] or not (len(count) == 2 or faded):
            raise ValueError(
                f"tensors: expected total and residual (B, G, C) and count (B, G), or (B, G, R) with R a divisor of C, "
                f"got {shapes}"
            )
        return state

    def save(self, path: str | PathLike) -> None:
        """Writes a safetensors file, atomically: after an error the old file is unchanged."""
        from safetensors.torch import save_file

        from .._io import atomic_write

        with atomic_write(path) as aside:
            save_file({name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}, aside)

    @classmethod
    def load(cls, path: str | PathLike) -> State:
        """Reads a file that `save` wrote, to the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return cls.from_state_dict(load(Path(path).read_bytes()))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"path: {path} is not a complete state file ({error})") from None
