"""PoM: the polynomial mixer as a layer, the drop-in for multi-head attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Rotary, State, _library, polynomial_mix, polynomial_readout, polynomial_state, rotary_table
from ..ops.arguments import Frames, Gate, Polynomial, Visibility, check_mutually_exclusive, query_offsets
from ..ops.checks import MAX_HEADS, accumulator, check_form, check_state, check_tensor, frame_offsets, is_integer
from ..ops.dispatch import LayerCall, choose
from ..ops.linear import all_unmodified, project
from ..ops.projected import folded_readout, projected_readout, projected_state
from ..ops.rotary import AXES
from .grouped_linear import GroupedLinear
from .layout import FULL_CONTEXT, frame_means

MEMORY = ("store", "recompute")
READS = ("shared", "split")
FADES = (None, "head", "gated")
SLOWEST = 4.0  # logit of the slowest fade at the start, 0.98; the fastest is 0.5


def check_past(state: State, expected: State, device: torch.device) -> None:
    """TypeError or ValueError unless `state` is on the device and a past as this layer keeps it."""
    if not isinstance(state, State):
        raise TypeError(f"state: expected a State, got {type(state).__name__}")
    for name, tensor in expected.state_dict().items():
        given = getattr(state, name)
        if given.shape != tensor.shape or given.dtype != tensor.dtype or given.device != device:
            raise ValueError(
                f"state.{name}: expected {tuple(tensor.shape)} in {tensor.dtype} on {device}, as this layer returns "
                f"it, got {tuple(given.shape)} in {given.dtype} on {given.device}"
            )


def _stacked(x: Tensor, projections: Sequence[Any]) -> Tensor:
    """The projections of x side by side, as one product."""
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in projections]
    return F.linear(x, torch.cat([p.weight for p in projections]), torch.cat(biases))


class PoM(nn.Module):
    """Polynomial mixer: y = W_o (γ(W_g x) ⊙ H) + b_o, with H the mean polynomial feature of the context W_c c.

    Args:
        dim: width D of the tokens.
        degree: degree of the polynomial, 1 to 16.
        expand: width of one polynomial factor, in multiples of `dim`.
        form: "product" (arXiv 2411.12663, davidpicard/HoMM `HoM`) or "power" (arXiv 2604.06129, davidpicard/pom `PoM`).
        n_groups: groups of the context projection (block-diagonal weight).
        n_sel_heads: 1 for a gate per channel, more for one scalar gate per head of channels.
        bias: biases on the context and output projections; None takes the authors' default, True for product and
            False for power. The gate of the power form always has one, as the authors' has.
        rope: None, "1d", "2d" or "3d": rotary positions on the features and on the gate (power form).
        memory: what training keeps for the gradients: "store" keeps the projections of all tokens, "recompute" only the
            tokens, and projects again: a fifth more time, on a CPU block by block, so that they are never all there.
        read: "shared": a token reads one mean, over its own frame and everything before. "split": it reads two, each by
            a gate of its own, y = W_o (γ(W_g x) ⊙ H_own + γ(W_p x) ⊙ H_past) + b_o, so that neither drowns the other
            in a long stream. H_past is 0 at the first frame. A frame is one of `frames`, a token with `causal`,
            otherwise the whole context, before which only `state` lies.
        fade: with read="split", how much of the past is left when a frame is added to it, S <- λ ⊙ S + s. None: all.
            "head": a learned λ for every gate of a token (every head, or every channel). "gated": as many, computed
            from the mean token of the frame.

    Raises:
        ValueError: a size that does not divide, or a value outside the ranges above.
    """

    def __init__(
        self,
        dim,
        degree=2,
        expand=2,
        *,
        form="product",
        n_groups=1,
        n_sel_heads=1,
        bias=None,
        rope=None,
        memory="store",
        read="shared",
        fade=None,
    ):
        super().__init__()
        check_form(form, degree)
        if dim < 1 or expand < 1:
            raise ValueError(f"dim and expand: expected positive integers, got dim={dim}, expand={expand}")
        self.dim, self.degree, self.expand, self.form, self.rope = dim, degree, expand, form, rope
        self.n_groups, self.n_sel_heads = n_groups, n_sel_heads
        width = dim * expand * (degree if form == "product" else 1)  # C: channels of the state
        if n_groups < 1 or dim % n_groups or width % n_groups:
            raise ValueError(f"n_groups: expected a divisor of dim={dim}, got {n_groups}")
        if not 1 <= n_sel_heads <= MAX_HEADS or width % n_sel_heads:
            raise ValueError(
                f"n_sel_heads: expected a divisor of the state width {width}, at most {MAX_HEADS}, got {n_sel_heads}"
            )
        if rope is not None:
            if rope not in AXES:
                raise ValueError(f"rope: expected None, '1d', '2d' or '3d', got {rope!r}")
            if form != "power":
                raise ValueError("rope: rotary positions are defined for form='power' only, got form='product'")
            pairs = width if n_sel_heads == 1 else n_sel_heads
            if pairs < 2 * AXES[rope]:
                raise ValueError(f"rope: {rope!r} needs at least {2 * AXES[rope]} gates to rotate, got {pairs}")
        if memory not in MEMORY:
            raise ValueError(f"memory: expected 'store' or 'recompute', got {memory!r}")
        if read not in READS:
            raise ValueError(f"read: expected 'shared' or 'split', got {read!r}")
        if fade not in FADES or (fade and read == "shared"):
            raise ValueError(
                f"fade: expected None, or with read='split' also 'head' or 'gated', got {fade!r} and {read!r}"
            )
        self.memory, self.split, self.fade = memory, read == "split", fade
        bias = (form == "product") if bias is None else bias
        self.state_width = width
        grouped = n_groups > 1
        self.context_proj = GroupedLinear(dim, width, n_groups, bias) if grouped else nn.Linear(dim, width, bias=bias)
        self.gate_proj = nn.Linear(dim, n_sel_heads if n_sel_heads > 1 else width, bias=bias or form == "power")
        self.out_proj = nn.Linear(width, dim, bias=bias)
        if self.split:
            self.past_gate_proj = nn.Linear(dim, self.gate_proj.out_features)
        if fade == "head":
            self.fade_logit = nn.Parameter(torch.empty(self.gate_proj.out_features))
        elif fade == "gated":
            self.fade_proj = nn.Linear(dim, self.gate_proj.out_features)
        self.reset_past()
        self.register_parameter("coeff", None)
        if form == "power":
            # Starts as the activation itself, plus small higher powers for the training to grow.
            coeff = torch.randn(width, degree) * 0.1
            coeff[:, 0] += 1
            self.coeff = nn.Parameter(coeff)

    def extra_repr(self):
        return (
            f"dim={self.dim}, degree={self.degree}, expand={self.expand}, form={self.form!r}, "
            f"n_groups={self.n_groups}, n_sel_heads={self.n_sel_heads}, rope={self.rope!r}, memory={self.memory!r}, "
            f"read={'split' if self.split else 'shared'!r}, fade={self.fade!r}"
        )

    @torch.no_grad()
    def reset_past(self) -> None:
        """Initialise the read of the past: half of it, whatever the token, fading from fast (0.5) to slow (0.98)."""
        if self.split:
            for parameter in self.past_gate_proj.parameters():
                parameter.zero_()
        if self.fade is not None:
            logit = self.fade_logit if self.fade == "head" else self.fade_proj.bias
            logit.copy_(torch.linspace(0, SLOWEST, len(logit)))
        if self.fade == "gated":
            self.fade_proj.weight.zero_()

    def _rotaries(self, x, context, positions, context_positions):
        """Angle tables of the features and of the gate."""
        if self.rope is None:
            for name, given in (("positions", positions), ("context_positions", context_positions)):
                if given is not None:
                    raise ValueError(
                        f"{name}: this layer has no rotary positions; build it with rope='1d', '2d' or '3d'"
                    )
            return None, None
        axes = AXES[self.rope]
        if context is x and context_positions is None:
            context_positions = positions
        tables = []
        for name, given, tokens in (("context_positions", context_positions, context), ("positions", positions, x)):
            if given is None:
                if axes > 1:
                    raise ValueError(f"{name}: rope={self.rope!r} needs the coordinates of the tokens, (N, {axes})")
                given = torch.arange(tokens.shape[1], device=tokens.device)
            expected = (tokens.shape[1],) if axes == 1 and given.dim() == 1 else (tokens.shape[1], axes)
            if tuple(given.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(given.shape)}")
            tables.append(given)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        width, heads = self.state_width, self.n_sel_heads
        features = rotary_table(tables[0], width, axes, dtype=dtype)
        if heads == 1:
            return features, rotary_table(tables[1], width, axes, dtype=dtype)
        stride = max(1, width // heads // 2 * axes)  # heads of one channel turn as the features do
        return features, rotary_table(tables[1], heads, axes, stride, table_channels=width, dtype=dtype)

    def forward(
        self,
        x,
        context=None,
        *,
        weight=None,
        mask=None,
        causal=False,
        frames=None,
        cu_seqlens=None,
        positions=None,
        context_positions=None,
        state=None,
        return_state=False,
    ):
        """Mix. Every context mode of `polynomial_mix` is available here.

        Args:
            x: (B, M, dim) query tokens.
            context: (B, N, dim) context tokens; None mixes x with itself.
            weight: (B, N) weight of each context token, at least 0; a padding mask is one.
            mask: (B, M, N) who sees whom; the one mode that is not linear in tokens.
            causal: token m sees tokens 0..m.
            frames: one frame length, or offsets 0, ..., N; a token of frame f sees frames 0..f.
            cu_seqlens: offsets 0, ..., N of packed sequences that do not see each other.
            positions, context_positions: (M,) or (M, axes) coordinates for `rope`.
            state: `State` of what came before, seen by every query.
            return_state: also return the `State` after the last context token. With `fade` it fades (`State.then`).

        Returns:
            (B, M, dim) in the dtype of x, under autocast in that of autocast; and the State if asked for.

        Raises:
            ValueError, TypeError: an argument of another shape, dtype or device, two that exclude each other, or
                coordinates that `rope` lacks; the message names it.
            ImportError: there is no compiled library.
        """
        _library.load()
        context = x if context is None else context
        check_tensor("x", x, ("B", "M", self.dim))
        if context is not x:
            check_tensor("context", context, (x.shape[0], "N", self.dim), like=x)
        rotary, gate_rotary = self._rotaries(x, context, positions, context_positions)
        mode = "causal" if causal else "mask" if mask is not None else None
        if frames is not None or cu_seqlens is not None:
            mode = mode or "groups"
        if (causal or frames is not None or cu_seqlens is not None) and context.shape[1] != x.shape[1]:
            raise ValueError(
                "context: with causal, frames or cu_seqlens the queries are the context tokens, got "
                f"{context.shape[1]} of these and {x.shape[1]} queries"
            )
        if self.split:
            check_mutually_exclusive(frames=frames, causal=causal or None)
            if mask is not None or cu_seqlens is not None:
                raise ValueError("mask, cu_seqlens: read='split' takes frames, causal or neither; use read='shared'")
            features = {"weight": weight, "rotary": rotary}
            y, state = self._mix_split(x, context, 1 if causal else frames, features, gate_rotary, state)
            return (y, state) if return_state else y
        groups: dict[str, Any] = {"frames": frames, "cu_seqlens": cu_seqlens}
        features = {"weight": weight, "rotary": rotary, "state": state}
        if choose("layer", LayerCall(self, x, mode)) == "one operation":
            tokens, gates = project(self.context_proj, context), project(self.gate_proj, x)
            options = {"form": self.form, "degree": self.degree, "n_sel_heads": self.n_sel_heads} | groups | features
            options |= {"mask": mask, "causal": causal, "gate_rotary": gate_rotary, "return_state": return_state}
            mixed = polynomial_mix(tokens, gates, self.coeff, **options)
            if isinstance(mixed, tuple):
                return project(self.out_proj, mixed[0]), mixed[1]
            return project(self.out_proj, mixed)
        if return_state:
            check_mutually_exclusive(return_state=True, cu_seqlens=cu_seqlens)
        state = self.state_of(context, **features, **groups)
        y = self.read(x, state, rotary=gate_rotary, **groups)
        return (y, state.last()) if return_state else y

    def state_of(
        self,
        context: Tensor,
        *,
        weight: Tensor | None = None,
        frames: Frames | None = None,
        cu_seqlens: Frames | None = None,
        rotary: Rotary | None = None,
        state: State | None = None,
    ) -> State:
        """The State of context tokens (B, N, dim); the other arguments as of `polynomial_state`."""
        if choose("layer state", LayerCall(self, context)) == "stored projection":
            tokens = project(self.context_proj, context)
            options = {"form": self.form, "degree": self.degree, "frames": frames, "cu_seqlens": cu_seqlens}
            return polynomial_state(tokens, self.coeff, weight=weight, rotary=rotary, state=state, **options)
        visibility = Visibility.of(context, weight=weight, frames=frames, cu_seqlens=cu_seqlens)
        if state is not None:
            check_mutually_exclusive(state=state, cu_seqlens=cu_seqlens)
            check_state("state", state, (context.shape[0], 1, self.state_width), context.dtype, context)
        polynomial = Polynomial(self.form, self.degree, self.coeff, rotary)
        return projected_state(context, self.context_proj, polynomial, visibility, state, self._saves(context))

    def read(
        self,
        x: Tensor,
        state: State,
        *,
        frames: Frames | None = None,
        cu_seqlens: Frames | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """(B, M, dim): the readout of query tokens (B, M, dim); the other arguments as of `polynomial_readout`."""
        groups = state.total.shape[1]
        even = cu_seqlens is None and not isinstance(frames, (list, tuple, torch.Tensor))
        taken = choose("layer readout", LayerCall(self, x, None, groups, even))
        if taken == "stored projection":
            gates, options = project(self.gate_proj, x), {"form": self.form, "n_sel_heads": self.n_sel_heads}
            y = polynomial_readout(gates, state, frames=frames, cu_seqlens=cu_seqlens, rotary=rotary, **options)
            return project(self.out_proj, y)
        projections, gate = (self.gate_proj, self.out_proj), Gate(None, self.n_sel_heads, rotary)
        if taken == "streamed projection":
            offsets = query_offsets(x, groups, frames, cu_seqlens)
            return projected_readout(x, projections, state, gate, self.form, offsets, self._saves(x, state.total))
        # One frame length deals the queries evenly.
        offsets = None if is_integer(frames) else query_offsets(x, groups, frames, cu_seqlens)
        return folded_readout(x, projections, state, gate, self.form, offsets)

    def _mix_split(
        self,
        x: Tensor,
        context: Tensor,
        frames: Frames | None,
        features: dict[str, Any],
        gate_rotary: Rotary | None,
        state: State | None,
    ) -> tuple[Tensor, State]:
        """Each frame reads itself and the past; also returns the past after the last frame."""
        offsets = None if frames is None else frame_offsets(frames, x.shape[1], x)
        own = self.state_of(context, cu_seqlens=offsets, **features)
        state = self.new_past(x.shape[0], own.total.dtype, x.device) if state is None else state
        check_past(state, self.new_past(x.shape[0], own.total.dtype, "meta"), x.device)
        if is_integer(frames) and not x.shape[1]:  # no frame, so nothing fades
            return self.read_each(x, [own.mean()], [self.gate_proj]), state
        uneven = None if is_integer(frames) else offsets
        fade = self.fade_of(context, own.total.shape[1] if uneven is None else uneven, features["weight"])
        past, after = FULL_CONTEXT.sum_earlier(state, own, fade)
        gates = [self.gate_proj, self.past_gate_proj]
        return self.read_each(x, [own.mean(), past.mean()], gates, offsets=uneven, rotary=gate_rotary), after

    def new_past(self, batch: int, dtype: torch.dtype, device: torch.device | str, groups: int = 1) -> State:
        """The past before the first frame: a `State` (B, groups, C) of no tokens, which fades if the layer does."""
        empty = State.empty(batch, self.state_width, groups, dtype=dtype, device=device)
        return empty.fading(self.gate_proj.out_features).clone() if self.fade else empty

    def fade_of(self, context: Tensor, frames: int | Tensor, weight: Tensor | None = None) -> Tensor | None:
        """How much of the past is left when each frame of the context (B, N, D) is added: (R,), (B, T, R) or None.

        Args:
            context: tokens of T frames.
            frames: T, for frames of one length, or offsets (T + 1,).
            weight: (B, N) or None.
        """
        if self.fade is None:
            return None
        wide = accumulator(context.dtype)  # near 1, half precision would round the fade itself too coarsely
        if self.fade == "head":
            return self.fade_logit.to(wide).sigmoid()
        mean = frame_means(context.to(wide), frames, weight).to(context.dtype)
        return project(self.fade_proj, mean).to(wide).sigmoid()

    def read_each(
        self,
        x: Tensor,
        means: Sequence[Tensor],
        gate_projections: Sequence[nn.Module],
        *,
        offsets: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """W_o Σ_i γ(P_i x) ⊙ mean_i + b_o (B, M, dim), for means (B, G, C) and a gate projection P_i of each.

        `offsets` (G + 1,) are those of the queries of every group; None divides them evenly.
        """
        heads, projections = self.n_sel_heads, [*gate_projections, self.out_proj]
        if heads == 1 or rotary is not None or offsets is not None or not all_unmodified(x, *projections):
            y = x.new_zeros(())
            for projection, mean in zip(gate_projections, means, strict=True):
                state = State(mean, torch.zeros_like(mean), mean.new_ones(mean.shape[:2], dtype=torch.float64))
                options = {"form": self.form, "n_sel_heads": heads, "rotary": rotary}
                y = y + polynomial_readout(project(projection, x), state, cu_seqlens=offsets, **options)
            return project(self.out_proj, y)
        y, left = self.out_proj.bias, list(zip(gate_projections, means, strict=True))
        while left:  # reads of equal groups in one product
            groups = left[0][1].shape[1]
            alike = [pair for pair in left if pair[1].shape[1] == groups]
            left = [pair for pair in left if pair[1].shape[1] != groups]
            folded = self._fold(torch.stack([mean for _, mean in alike], dim=2))
            gate = self._gate_value(_stacked(x, [gate for gate, _ in alike]))
            part = (gate.unflatten(1, (groups, -1)) @ folded.to(gate.dtype)).flatten(1, 2)  # (B, M, dim)
            y = part if y is None else part + y.to(part.dtype)
        assert y is not None
        return y

    def _fold(self, means: Tensor) -> Tensor:
        """W_o of every head of the means (B, G, reads, C): (B, G, reads * heads, dim).

        A scalar gate commutes with the output projection: the means are projected, not the tokens.
        """
        batch, groups, reads, _ = means.shape
        with torch.autocast(means.device.type, enabled=False):
            weight = self.out_proj.weight.to(means.dtype).unflatten(1, (self.n_sel_heads, -1)).permute(1, 2, 0)
            by_head = means.unflatten(-1, (self.n_sel_heads, -1)).permute(3, 0, 1, 2, 4).flatten(1, 3)
            folded = torch.bmm(by_head, weight)  # (heads, B * G * reads, dim)
        return folded.transpose(0, 1).reshape(batch, groups, reads * self.n_sel_heads, self.dim)

    def _gate_value(self, gate: Tensor) -> Tensor:
        """γ of gates (B, M, K)."""
        if self.form == "product":
            return torch.sigmoid(gate)
        if not torch.is_grad_enabled():
            return F.hardsigmoid(gate)
        # The readout of means of one has second derivatives, which F.hardsigmoid has not.
        ones = gate.new_ones(gate.shape[0], 1, gate.shape[2], dtype=accumulator(gate.dtype))
        state = State(ones, torch.zeros_like(ones), torch.ones_like(ones[..., 0], dtype=torch.float64))
        return polynomial_readout(gate, state, form=self.form)

    def _saves(self, *inputs: Tensor) -> bool:
        """Whether projections are stored, because gradients will need them."""
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.parameters()))
        return differentiated and self.memory == "store"
