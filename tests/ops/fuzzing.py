"""A call of the operations or of the layer as a value that hypothesis can draw, print and shrink, and its one check:
every result, gradient and tangent against the definition in float64."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from cases import (
    Case,
    assert_accurate,
    draw_inputs,
    move,
    offsets,
    prior_state,
    reference_context,
    reference_state,
    state_dtype,
)
from layouts import LAYOUTS, with_layout

from pom_ext import PoM, State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.ops import Rotary, reference, rotary_table


@dataclass(frozen=True)
class Call:
    """A call of the operations, as hypothesis prints it. Copied into a test it is the same call again.

    entry: a function of this file below.
    seed: of all numbers.
    signed: numbers of both signs, kinks and tails among them; otherwise positive ones, of which no sum cancels.
    offsets: of frames or sequences, or one frame length.
    cut: the number of tokens in the first of two pieces.
    weights: dtype of weight or mask; coeff: dtype of the coefficients; None for that of the inputs.
    layouts: (argument, name in LAYOUTS).
    wanted: leaves that require grad. received: outputs that a gradient comes back to. moved: leaves with a tangent.
    """

    case: Case
    entry: str = "mix"
    seed: int = 0
    signed: bool = False
    offsets: int | tuple | None = None
    cut: int = 0
    weights: torch.dtype | None = None
    coeff: torch.dtype | None = None
    layouts: tuple = ()
    wanted: tuple = ()
    received: tuple = ()
    moved: tuple = ()

    @property
    def every_group(self):
        """Whether the state is compared group by group."""
        return self.entry in ("state", "apart", "merged")

    @property
    def leaves(self):
        return [
            *("u", "gate")[: 1 if self.entry == "state" else 2],
            *["coeff"] * (self.case.form == "power"),
            *["prior"] * self.case.prior,
        ]

    @property
    def outputs(self):
        y = [] if self.entry == "state" else ["y"]
        return y + ["state"] if self.every_group or self.case.returns_state else y

    def inputs(self):
        torch.manual_seed(self.seed)
        inputs = draw_inputs(self.case)
        self.finish_context(inputs.context)
        inputs.leaves = {name: inputs.leaves[name] for name in self.leaves}
        if self.coeff is not None:
            inputs.leaves["coeff"] = inputs.leaves["coeff"].to(self.coeff)
        if self.every_group:
            shape = self.definition(inputs, torch.float64)(**move(inputs.leaves, dtype=torch.float64))["state"].shape
            several = max(self.case.tokens * shape[1], 1) ** 0.5  # float16 must hold sums over groups, then over tokens
            grad = (1 + torch.randn(shape, dtype=state_dtype(self.case.dtype))) / several
            inputs.output_grads["state"] = grad
        return laid_out(inputs if self.signed else positive(inputs), self.layouts)

    def finish_context(self, context):
        for name in ("frames", "cu_seqlens"):
            if name in context:
                context[name] = torch.tensor(self.offsets) if name == "cu_seqlens" else self.offsets
        for name in ("weight", "mask"):
            if name in context and self.weights is not None:
                weights = context[name].ne(0) if self.weights == torch.bool else context[name] * 3
                context[name] = weights.to(self.weights)

    def operation(self, inputs, device):
        """Outputs as a function of the leaves, by the operations."""
        given = Given(inputs, device)

        def run(u, gate=None, coeff=None, prior=None):
            before = prior_state(inputs, prior, device)
            y, state = ENTRIES[self.entry](given, self.cut, u, gate, coeff, before)
            return {"y": y} | ({} if state is None else {"state": state.total, "count": state.count})

        return run

    def definition(self, inputs, dtype):
        """The same by the definition in plain torch."""
        case = self.case
        if case.mode.startswith(("frames", "causal")) and len(offsets(self.offsets or 1, case.tokens)) == 1:
            # No frames are one without tokens: there is a state after it.
            weight = {name: value for name, value in inputs.context.items() if name == "weight"}
            inputs = replace(inputs, context={"frames": [0, 0]} | weight)
        context, rotaries = reference_context(inputs, dtype)
        edges = context.get("frames", context.get("cu_seqlens"))
        if edges is None and case.mode.startswith(("causal", "mask")):  # a group for every query
            edges = range((case.tokens if case.queries is None else case.queries) + 1)

        def run(u, gate=None, coeff=None, prior=None):
            total, count = reference_state(inputs, u, coeff, prior)
            outputs = {"state": total, "count": count}
            if gate is not None:
                outputs["y"] = reference.readout(
                    gate, total, count, form=case.form, n_sel_heads=case.heads, rotary=rotaries.get("gate_rotary"),
                    query_offsets=None if edges is None else list(edges),
                )  # fmt: skip
            if not self.every_group:  # what is returned is the state of all tokens, whatever the groups
                weight = {name: context[name] for name in ("weight",) if name in context}
                outputs["state"], outputs["count"] = reference_state(replace(inputs, context=weight), u, coeff, prior)
            return outputs

        return run

    def check(self, device="cpu"):
        inputs = self.inputs()
        # Sums are not kept in half precision: a state alone is measured against plain torch in the dtype of the state.
        plain_dtype = state_dtype(self.case.dtype) if self.entry == "state" else self.case.dtype
        results, count = self.results(self.operation(inputs, device), inputs, device)
        exact, exact_count = self.results(self.definition(inputs, torch.float64), inputs, "cpu", torch.float64)
        plain, _ = self.results(self.definition(inputs, plain_dtype), inputs, "cpu", plain_dtype)
        if count is not None:
            torch.testing.assert_close(count.cpu(), exact_count, rtol=1e-12, atol=0)
        assert_accurate(results, exact, plain, self.case)

    def results(self, function, inputs, device, dtype=None):
        """Outputs, gradients and tangents by name, and the count."""
        leaves = {name: leaf.detach() for name, leaf in move(inputs.leaves, device, dtype).items()}
        before = {name: leaf.clone() for name, leaf in leaves.items()}
        for name in self.wanted:
            leaves[name].requires_grad_()
        outputs = function(**leaves)
        results = {name: outputs[name].detach() for name in self.outputs}
        received = [name for name in self.received if outputs[name].requires_grad]
        if received:
            grads = move(inputs.output_grads, device, dtype)
            torch.autograd.backward([outputs[name] for name in received], [grads[name] for name in received])
        for name, leaf in leaves.items():
            assert torch.equal(leaf, before[name]), f"{name} was written to"
            assert name in self.wanted or leaf.grad is None, f"{name} got a gradient that it did not require"
        for name in self.wanted:
            results[f"grad {name}"] = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
        if self.moved:
            leaves = {name: leaf.detach() for name, leaf in leaves.items()}
            moving = {name: leaves[name] for name in self.moved}
            directions = {name: d.to(moving[name]) for name, d in self.directions(inputs).items()}
            of_moving = lambda moving: {name: function(**leaves | moving)[name] for name in self.outputs}
            _, tangents = torch.func.jvp(of_moving, (moving,), (directions,))
            results |= {f"tangent {name}": tangent for name, tangent in tangents.items()}
        return results, outputs.get("count")

    def directions(self, inputs):
        """Short ones, so that float16 holds the sums of plain torch."""
        torch.manual_seed(self.seed + 1)
        directions = {name: torch.randn(inputs.leaves[name].shape) / 64 for name in self.moved}
        directions = {name: d if self.signed else d.abs() for name, d in directions.items()}
        return {name: d.to(inputs.leaves[name].dtype) for name, d in directions.items()}


def positive(inputs):
    """The same call with positive numbers, so that nothing cancels whatever is added up. All near 1 where the degree is
    high, so that float16 holds sums of powers, and its normal numbers the products of so many factors."""
    least = 1.0 if inputs.case.degree > 5 else 0.75
    leaves = {name: leaf if name.startswith("gate") else leaf.abs() for name, leaf in inputs.leaves.items()}
    leaves |= {name: leaves[name].clamp(least, 1.2) for name in ("u", "x", "context") if name in leaves}
    if "context_proj.weight" in leaves:
        weight = leaves["context_proj.weight"]
        leaves["context_proj.weight"] = weight / weight.sum(-1, keepdim=True)
    output_grads = {name: grad.abs() for name, grad in inputs.output_grads.items()}
    return replace(inputs, leaves=leaves, output_grads=output_grads, prior_residual=inputs.prior_residual.abs())


def laid_out(inputs, layouts):
    """The same call with tensors in other strides."""
    for argument, name in layouts:
        change = LAYOUTS[name]
        if name == "one value":  # of as few as there are
            change = lambda t: t.flatten()[:1].expand(t.shape) if t.numel() else t
        if argument == "residual":
            inputs = replace(inputs, prior_residual=change(inputs.prior_residual))
        elif argument in inputs.rotaries:
            table = inputs.rotaries[argument]
            table = table._replace(cos=change(table.cos), sin=change(table.sin))
            inputs = replace(inputs, rotaries=inputs.rotaries | {argument: table})
        else:
            inputs = with_layout(inputs, argument, change)
    return inputs


class Given:
    """The arguments of a case beside its leaves, for all tokens or for a piece of them."""

    def __init__(self, inputs, device):
        self.case = case = inputs.case
        self.context, self.rotaries = move((inputs.context, inputs.rotaries), device)
        self.formula = {"form": case.form, "degree": case.degree}
        self.dealt = {name: value for name, value in self.context.items() if name in ("frames", "cu_seqlens")}
        self.reading = {"n_sel_heads": case.heads}

    def features(self, start, stop, by_token=False):
        """Who sees whom among the tokens from `start` to `stop` alone. Groups keep their number."""
        arguments = {name: rotary_of(self.rotaries[name], start, stop) for name in ("rotary",) if name in self.rotaries}
        for name, value in self.context.items():
            if name == "causal" and by_token:
                name, value = "frames", range(self.case.tokens + 1)
            if name in ("frames", "cu_seqlens"):
                edges = offsets(value, self.case.tokens)
                value = [min(max(int(edge) - start, 0), stop - start) for edge in edges]
            elif name != "causal":
                value = value[..., start:stop]
            arguments[name] = value
        return self.formula | arguments

    def gates(self, start=None, stop=None):
        names = [name for name in ("gate_rotary",) if name in self.rotaries]
        return self.reading | {name: rotary_of(self.rotaries[name], start, stop) for name in names}

    def read(self, gate, state):
        arguments = self.gates()
        rotary = arguments.pop("gate_rotary", None)
        return polynomial_readout(gate, state, form=self.case.form, rotary=rotary, **self.dealt, **arguments), state


def rotary_of(table, start, stop):
    return Rotary(table.cos[start:stop], table.sin[start:stop], table.axes)


# How the operations are called, by the name of an entry: each gives y and the state, or None for what it does not give.


def mix(given, cut, u, gate, coeff, state):
    returns = given.case.returns_state
    arguments = given.formula | given.context | given.rotaries | given.reading
    result = polynomial_mix(u, gate, coeff, state=state, return_state=returns, **arguments)
    return result if returns else (result, None)


def state(given, cut, u, gate, coeff, state):
    return None, polynomial_state(u, coeff, state=state, **given.features(0, u.shape[1]))


def apart(given, cut, u, gate, coeff, before):
    """The state, then what the gates read of it."""
    arguments = given.formula | given.context
    arguments |= {name: given.rotaries[name] for name in ("rotary",) if name in given.rotaries}
    return given.read(gate, polynomial_state(u, coeff, state=before, **arguments))


def merged(given, cut, u, gate, coeff, before):
    """The states of the tokens before and after the cut, added."""
    first = polynomial_state(u[:, :cut], coeff, state=before, **given.features(0, cut, by_token=True))
    second = polynomial_state(u[:, cut:], coeff, **given.features(cut, u.shape[1], by_token=True))
    return given.read(gate, first + second)


def continued(given, cut, u, gate, coeff, state):
    """The tokens after the cut with the state of those before it."""
    parts = []
    for start, stop in ((0, cut), (cut, u.shape[1])):
        arguments = given.features(start, stop) | given.gates(start, stop)
        y, state = polynomial_mix(
            u[:, start:stop], gate[:, start:stop], coeff, state=state, return_state=True, **arguments
        )
        parts.append(y)
    return torch.cat(parts, dim=1), state


def update(given, cut, u, gate, coeff, state):
    """The same in place; the gates read the sum."""
    if state is None:
        width, dtype = given.case.channels, state_dtype(u.dtype)
        state = State.empty(u.shape[0], width, dtype=dtype, device=u.device)
    state = state.clone()
    for start, stop in ((0, cut), (cut, u.shape[1])):
        arguments = given.features(start, stop) | given.gates()
        y = polynomial_update(u[:, start:stop], gate, state, coeff, **arguments)
    return y, state


ENTRIES = {function.__name__: function for function in (mix, state, apart, merged, continued, update)}


@dataclass(frozen=True)
class Layer(Call):
    """A call of the layer, whose leaves are the tokens, the parameters and the state from before.

    Where the case has a number of queries they are tokens of their own, and the others the context.
    """

    dim: int = 16
    n_groups: int = 1
    bias: bool | None = None
    memory: str = "store"

    def build(self):
        case = self.case
        return PoM(
            self.dim, case.degree, case.width // self.dim, form=case.form, n_groups=self.n_groups,
            n_sel_heads=case.heads, bias=self.bias, rope=f"{case.axes}d" if case.axes else None, memory=self.memory,
        ).to(case.dtype)  # fmt: skip

    @property
    def leaves(self):
        tokens = ["x"] if self.case.queries is None else ["x", "context"]
        return tokens + [name for name, _ in self.build().named_parameters()] + ["prior"] * self.case.prior

    def positions(self, tokens):
        return torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.37, 2.5])[: self.case.axes]

    def inputs(self):
        torch.manual_seed(self.seed)
        case, inputs = self.case, draw_inputs(replace(self.case, axes=0))
        self.finish_context(inputs.context)
        queries = case.tokens if case.queries is None else case.queries
        shapes = {"x": (case.batch, queries, self.dim), "context": (case.batch, case.tokens, self.dim)}
        drawn = {name: torch.randn(shape) for name, shape in shapes.items()}
        drawn |= {name: parameter.detach() for name, parameter in self.build().named_parameters()}
        drawn = {name: value.to(case.dtype) for name, value in drawn.items()}
        drawn |= {"prior": inputs.leaves.get("prior")}
        inputs.leaves = {name: drawn[name] for name in self.leaves}
        inputs.output_grads["y"] = ((1 + torch.randn(shapes["x"])) / max(queries, 1) ** 0.5).to(case.dtype)
        if case.axes:
            table = partial(rotary_table, axes=case.axes, dtype=state_dtype(case.dtype))
            inputs.rotaries["rotary"] = table(self.positions(case.tokens), case.width)
            wide = {"channels": case.width}
            if case.heads not in (1, case.width):
                stride = case.width // case.heads // 2 * case.axes
                wide = {"channels": case.heads, "stride": stride, "table_channels": case.width}
            inputs.rotaries["gate_rotary"] = table(self.positions(queries), **wide)
        inputs = replace(inputs, case=case)
        return laid_out(inputs if self.signed else positive(inputs), self.layouts)

    def operation(self, inputs, device):
        case, layer = self.case, self.build().to(device)
        modes = move(inputs.context, device)
        if case.axes:
            modes["positions"] = self.positions(case.tokens if case.queries is None else case.queries).to(device)
            if case.queries is not None:
                modes["context_positions"] = self.positions(case.tokens).to(device)

        def run(x, context=None, prior=None, **parameters):
            modes["state"] = prior_state(inputs, prior, device)
            modes["return_state"] = case.returns_state
            result = torch.func.functional_call(layer, parameters, (x, context), modes)
            y, state = result if case.returns_state else (result, None)
            return {"y": y} | ({} if state is None else {"state": state.total, "count": state.count})

        return run

    def definition(self, inputs, dtype):
        mixed = super().definition(inputs, dtype)

        def run(x, context=None, prior=None, coeff=None, **parameters):
            weight, bias = parameters["context_proj.weight"], parameters.get("context_proj.bias")
            tokens = x if context is None else context
            if weight.dim() == 2:
                u = F.linear(tokens, weight, bias)
            else:  # a product each, as plain torch would: its sums are not those of one product with a block diagonal
                groups = zip(tokens.chunk(len(weight), -1), weight, strict=True)
                u = torch.cat([F.linear(part, matrix) for part, matrix in groups], -1)
                u = u if bias is None else u + bias
            gate = F.linear(x, parameters["gate_proj.weight"], parameters.get("gate_proj.bias"))
            outputs = mixed(u, gate, coeff, prior)
            y = F.linear(outputs["y"], parameters["out_proj.weight"], parameters.get("out_proj.bias"))
            return outputs | {"y": y}

        return run
