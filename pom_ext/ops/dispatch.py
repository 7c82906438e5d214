"""Which implementation a call takes: the first one registered that has no reason against it.

`explained` collects the decisions of calls, and with POM_EXT_EXPLAIN=1 in the environment each new decision is logged.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import call as call_operation
from .linear import all_unmodified, is_unmodified_linear

LOGGER = logging.getLogger("pom_ext.dispatch")

# Implementations that no measurement has shown to be faster on any GPU yet: `benchmarks.run layers` on one will tell.
UNMEASURED = {("project_state on a GPU", "fused kernel")}

# When a GPU gains by folding, by arithmetic for an H100 and not measured.
# Without gradients it is two kernels in the place of three. The fold of a group reads W_o, 2 D C bytes, from L2, at
# some 5.5 TB/s: as long as the output projection of 127 queries takes, 2 D C operations each at 700 TFLOP/s.
LEAST_OF_GROUP_ON_GPU = 128
# With gradients it is a dozen small kernels and a dozen for them, 2 to 3 µs each, some 60 µs of a call: as long as the
# three products of the output projection that it saves take for 3,300 queries (6 D C each; D = 1024, C = 2048).
LEAST_ON_GPU = 4096


class LayerCall(NamedTuple):
    """A call of a layer `PoM`, as far as its implementation depends on it.

    x: (B, N, D) tokens. mode: "causal", "mask", "groups" or None. groups: of the state that is read. even: whether the
    queries are divided evenly among the groups, without offsets.
    """

    layer: Any
    x: Tensor
    mode: str | None = None
    groups: int = 1
    even: bool = True


class Decision(NamedTuple):
    """The choice for one call.

    operation: what was called.
    taken: the implementation.
    refused: the implementations preferred to it, each with the reasons against it.
    """

    operation: str
    taken: str
    refused: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        why = "".join(f"; not {name}: {', '.join(reasons)}" for name, reasons in self.refused)
        return f"{self.operation}: {self.taken}{why}"


Supports = Callable[[Any], list[str]]
IMPLEMENTATIONS: dict[str, list[tuple[str, Supports]]] = {}
_listeners: list[Callable[[Decision], None]] = []


def implementation(operation: str, name: str) -> Callable[[Supports], Supports]:
    """Register supports(call) -> reasons why not, of an implementation; earlier ones are preferred."""

    def register(supports: Supports) -> Supports:
        IMPLEMENTATIONS.setdefault(operation, []).append((name, supports))
        return supports

    return register


def choose(operation: str, call: Any) -> str:
    """The name of the implementation that a call takes.

    Raises:
        NotImplementedError: every implementation has a reason against the call; the message lists them.
    """
    refused = []
    for name, supports in IMPLEMENTATIONS[operation]:
        reasons = supports(call)
        if not reasons:
            if _listeners and not torch.compiler.is_compiling():
                decision = Decision(operation, name, tuple(refused))
                for listener in tuple(_listeners):  # another thread may remove its own
                    listener(decision)
            return name
        refused.append((name, tuple(reasons)))
    raise NotImplementedError(f"{operation}: no implementation takes this call: {refused}")


@contextmanager
def explained() -> Iterator[list[Decision]]:
    """A list that fills with the decisions of this thread's calls inside, but for those of compiled graphs."""
    decisions: list[Decision] = []
    thread = threading.get_ident()

    def listen(decision: Decision) -> None:
        if threading.get_ident() == thread:
            decisions.append(decision)

    _listeners.append(listen)
    try:
        yield decisions
    finally:
        _listeners.remove(listen)


if os.environ.get("POM_EXT_EXPLAIN", "0") not in ("", "0"):
    LOGGER.addHandler(logging.StreamHandler())
    LOGGER.setLevel(logging.INFO)
    _listeners.append(functools.cache(lambda decision: LOGGER.info("%s", decision)))  # cached: each only once


def folding_pays(x: Tensor, groups: int, channels: int, n_sel_heads: int, *, even: bool = True) -> bool:
    """Whether a folded readout of queries (B, M, D) takes less arithmetic than an output projection of all of them."""
    if n_sel_heads == 1:
        return False
    if x.device.type == "cuda":
        gradients = torch.is_grad_enabled()
        if x.shape[0] * x.shape[1] < LEAST_ON_GPU if gradients else x.shape[1] < LEAST_OF_GROUP_ON_GPU * groups:
            return False
    gates = n_sel_heads if even else n_sel_heads * groups  # that a token is multiplied with
    return groups * n_sel_heads * channels + x.shape[1] * gates < x.shape[1] * channels


@implementation("layer", "one operation")
def _one_operation(call: LayerCall) -> list[str]:
    if call.mode in ("causal", "mask"):
        return []
    if not call.x.is_cuda:
        return ["on a CPU state and readout are faster together with their projections"]
    reasons = []
    if call.mode == "groups":
        reasons.append("frames and cu_seqlens have several groups")
    if call.layer.memory == "recompute":
        reasons.append("memory='recompute' stores no projection")
    if not _folded(call):
        reasons.append("the readout can be folded into the output projection")
    return reasons


@implementation("layer readout", "folded into the output projection")
def _folded(call: LayerCall) -> list[str]:
    layer, x, _, groups, even = call
    if layer.n_sel_heads == 1:
        return ["a gate per channel cannot be folded"]
    reasons = []
    if not is_unmodified_linear(layer.out_proj):
        reasons.append("the output projection is no plain nn.Linear: it has hooks, an adapter or quantised weights")
    if not folding_pays(x, groups, layer.state_width, layer.n_sel_heads, even=even):
        reasons.append("folding takes longer than the projection of so few queries")
    return reasons


def _streamed(call: LayerCall, *projections: nn.Module) -> list[str]:
    reasons = []
    if call.x.device.type != "cpu" and call.layer.memory != "recompute":
        reasons.append("on a GPU blocks are slower than one product; memory='recompute' takes them to save memory")
    if not all_unmodified(call.x, *projections):
        reasons.append("a projection is no plain nn.Linear: it has hooks, an adapter or quantised weights")
    return reasons


@implementation("layer state", "streamed projection")
def _streamed_state(call: LayerCall) -> list[str]:
    return _streamed(call, call.layer.context_proj)


@implementation("layer readout", "streamed projection")
def _streamed_readout(call: LayerCall) -> list[str]:
    return _streamed(call, call.layer.gate_proj, call.layer.out_proj)


@implementation("project_state on a GPU", "fused kernel")
def _fused_projection(args: dict[str, Any]) -> list[str]:
    if ("project_state on a GPU", "fused kernel") in UNMEASURED:
        return ["not measured on this GPU yet"]
    if args["cos"] is not None or args["coeff"] is None:
        return ["the kernel is for the power form without rotary positions"]
    if not call_operation("supports_fused_project_state", args):
        return ["this GPU, dtype or size has no kernel"]
    return []


@implementation("project_state on a GPU", "blocks of tokens")
@implementation("project_state_backward on a GPU", "blocks of tokens")
@implementation("project_readout on a GPU", "blocks of tokens")
def _blocks_of_tokens(args: dict[str, Any]) -> list[str]:
    reasons = []
    several_groups = args["total"].shape[1] != 1 if "out_weight" in args else args["offsets"] is not None
    if several_groups:
        reasons.append("offsets of groups lie on the GPU: reading them would wait for it")
    if len(args["x"]) == 0:
        reasons.append("the batch is empty")
    if args.get("x_tangent") is not None:
        reasons.append("tangents")
    return reasons


@implementation("folded_readout on a GPU", "fused kernel")
def _fused_folding(args: dict[str, Any]) -> list[str]:
    if args["gate_cos"] is not None:
        return ["the kernel has no rotary positions"]
    if args["x_tangent"] is not None:
        return ["tangents"]
    if not call_operation("supports_fused_folded_readout", args):
        return ["this GPU, dtype or size has no kernel"]
    return []


@implementation("layer", "state, then readout")
@implementation("layer state", "stored projection")
@implementation("layer readout", "stored projection")
@implementation("project_state on a GPU", "stored projection")
@implementation("project_state_backward on a GPU", "stored projection")
@implementation("project_readout on a GPU", "stored projection")
@implementation("folded_readout on a GPU", "products of matrices")
def _every_call(call: Any) -> list[str]:
    return []
