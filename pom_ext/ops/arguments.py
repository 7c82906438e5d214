"""Arguments of the operations as objects, checked once, and `call`, which lays them out as an operation takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    FORMS,
    accumulator,
    check_features,
    check_heads,
    check_rotary,
    check_tensor,
    check_weights,
    frame_offsets,
    offsets_tensor,
)
from .rotary import Rotary

Frames = int | list | tuple | Tensor


class Operation(NamedTuple):
    """A registered operation and, in the order of its schema, the default of every argument by name."""

    function: Any
    defaults: dict[str, Any]


OPERATIONS: dict[str, Operation] = {}  # by name, filled by `describe`


def describe(name: str) -> None:
    """Look up torch.ops.pom_ext.<name> and keep the order of its arguments for `call`."""
    function = getattr(torch.ops.pom_ext, name).default
    of_type = {"bool": False, "int": 0}
    defaults = {argument.name: of_type.get(str(argument.type)) for argument in function._schema.arguments}
    OPERATIONS[name] = Operation(function, defaults)


def call(operation: str, *groups: Mapping[str, Any], **arguments: Any):
    """Call torch.ops.pom_ext.<operation> by the names in its schema.

    Args:
        operation: its name.
        groups: arguments by name, as `to_kernel` gives them; later ones replace earlier ones, and names that the
            operation does not have are ignored.
        arguments: more of them, which replace those of the groups. An argument that nobody gives is None, 0 or False.
    """
    function, defaults = OPERATIONS[operation]
    named = defaults.copy()  # in the order of the schema; names that it does not have come behind
    for group in groups:
        named.update(group)
    named.update(arguments)
    return function(*list(named.values())[: len(defaults)])


def check_mutually_exclusive(**modes: Any) -> None:
    """ValueError if more than one of the arguments is given."""
    given = [name for name, value in modes.items() if value is not None and value is not False]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]}: each says who sees whom; give one of them")


class Polynomial(NamedTuple):
    """Which polynomial of the tokens is summed.

    form: "product" (arXiv 2411.12663) or "power" (arXiv 2604.06129).
    degree: 1 to 16.
    coeff: (E, degree) of the power form.
    rotary: angles by which the features are rotated (power form).
    """

    form: str
    degree: int
    coeff: Tensor | None = None
    rotary: Rotary | None = None

    def check(self, u: Tensor) -> None:
        """ValueError or TypeError unless u (B, N, C) are tokens of this polynomial."""
        check_features(u, self.coeff, self.form, self.degree)
        if self.rotary is not None:
            check_rotary("rotary", self.rotary, u.shape[1], u.shape[2], self.form, u)

    def to_kernel(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of an operation on tokens of this dtype."""
        coeff = None if self.coeff is None else self.coeff.to(accumulator(dtype))
        arguments: dict[str, Any] = {"coeff": coeff, "form": FORMS.index(self.form), "degree": self.degree}
        if self.rotary is not None:
            arguments["cos"], arguments["sin"], arguments["axes"] = self.rotary
        return arguments


class Visibility(NamedTuple):
    """Which context tokens a group sums.

    weight: (B, N) of every token.
    mask: (B, M, N) weights of every token for M groups.
    offsets: (G + 1,) int64, 0, ..., N: the tokens of every group; None is one group of all tokens.
    cumulative: groups also sum the tokens of the groups before them.
    """

    weight: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None
    cumulative: bool = False

    @classmethod
    def of(
        cls,
        u: Tensor,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        frames: Frames | None = None,
        cu_seqlens: Frames | None = None,
    ) -> Visibility:
        """What the arguments of a call say of the context tokens u (B, N, ...), checked.

        Raises:
            ValueError, TypeError: an argument of another shape, dtype or device, or two that exclude each other.
        """
        batch, tokens = u.shape[:2]
        if weight is not None:
            if mask is not None:
                raise ValueError("mask and weight: the mask holds the weights already; give one of them")
            weight = check_weights("weight", weight, (batch, tokens), u)
        if mask is None and frames is None and cu_seqlens is None and not causal:
            return cls(weight)
        check_mutually_exclusive(mask=mask, causal=causal, frames=frames, cu_seqlens=cu_seqlens)
        if mask is not None:
            return cls(mask=check_weights("mask", mask, (batch, "M", tokens), u))
        if causal or frames is not None:
            return cls(weight, offsets=frame_offsets(1 if causal else frames, tokens, u), cumulative=True)
        return cls(weight, offsets=offsets_tensor("cu_seqlens", cu_seqlens, tokens, u))

    def to_kernel(self) -> dict[str, Any]:
        weight, mask, offsets, cumulative = self
        return {"weight": weight, "mask": mask, "offsets": offsets, "cumulative": cumulative}


class Gate(NamedTuple):
    """Who reads a state, and how.

    values: (B, M, C), or (B, M, n_heads) with one number for a head of C / n_heads channels; None for operations that
        project the queries to gates themselves.
    rotary: angles by which the gates are rotated (power form).
    """

    values: Tensor | None = None
    n_heads: int = 1
    rotary: Rotary | None = None

    def check(self, shape: tuple, dtypes: tuple = FLOATS, like: Tensor | None = None) -> None:
        """ValueError or TypeError unless these are gates (B, M) of a state of C channels; shape: (B, M, C)."""
        batch, queries, channels = shape
        check_heads(self.n_heads, channels)
        check_tensor(
            "gate", self.values, (batch, queries, self.n_heads if self.n_heads > 1 else channels), dtypes, like
        )

    def check_rotary(self, name: str, form: str) -> None:
        if self.rotary is not None and self.values is not None:
            check_rotary(name, self.rotary, self.values.shape[1], self.values.shape[2], form, self.values)

    def to_kernel(self) -> dict[str, Any]:
        arguments = {"gate": self.values, "heads": self.n_heads}
        if self.rotary is not None:
            arguments["gate_cos"], arguments["gate_sin"], arguments["gate_axes"] = self.rotary
        return arguments


class Projection(NamedTuple):
    """Weight (out, in) and bias (out,) or None of a linear map."""

    weight: Tensor
    bias: Tensor | None = None

    def to_kernel(self, name: str) -> dict[str, Any]:
        """The arguments of an operation that calls the map `name`: "context", "gate" or "out"."""
        return {f"{name}_weight": self.weight, f"{name}_bias": self.bias}


def query_offsets(queries: Tensor, groups: int, frames: Frames | None, cu_seqlens: Frames | None) -> Tensor | None:
    """(groups + 1,) offsets of the queries (B, M, ...) of every group; None divides them evenly."""
    check_mutually_exclusive(frames=frames, cu_seqlens=cu_seqlens)
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
