"""Cases of the ops."""

from dataclasses import dataclass
from math import prod

import torch

from pom_ext import State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.ops import reference

from . import baselines
from .measure import (
    CONSTANT,
    OURS,
    Setup,
    Target,
    as_tuple,
    backward,
    forward,
    leaves,
    measure_times,
    output_grad,
    training_step,
)
from .timing import Contender

STATE = ("total", "residual", "count")


def short(dtype):
    return str(dtype).removeprefix("torch.")


def with_state(total=None, residual=None, count=None, **tensors):
    """The inputs of a case as the ops take them: a state in place of its three tensors."""
    return tensors if total is None else {**tensors, "state": State(total, residual, count)}


@dataclass(frozen=True)
class OpCase:
    """One op on random tokens: u (batch, tokens, width), in product form (batch, tokens, degree * width).

    op: "state", "readout", "mix", "causal_mix", or "update", in place on a state.
    passes: "forward", "backward" (gradients alone) or "both".
    weighted: with a weight for every context token.
    clock: the one that times it, by its name on the device.
    """

    op: str
    form: str
    degree: int
    tokens: int
    width: int = 1024
    heads: int = 1
    dtype: torch.dtype = torch.float32
    batch: int = 1
    passes: str = "forward"
    weighted: bool = False
    device: str = "cpu"
    clock: str = "host"
    against: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()

    @property
    def name(self):
        passes = {"forward": "", "backward": "_backward", "both": "_train"}[self.passes]
        heads = f"-heads{self.heads}" if self.heads > 1 else ""
        batch = f"-B{self.batch}" if self.batch > 1 else ""
        clock = f"-{self.clock}" if self.clock in ("graph", "latency") else ""
        size = f"N{self.tokens}-E{self.width}-{short(self.dtype)}"
        return f"{'weighted_' * self.weighted}{self.op}{passes}-{self.form}{self.degree}{heads}{batch}-{size}{clock}"

    @property
    def differentiates(self):
        return self.passes != "forward"

    @property
    def channels(self):
        return self.width * (self.degree if self.form == "product" else 1)

    def inputs(self):
        """{name: (shape, dtype)}"""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        found = {}
        if self.op != "readout":
            found["u"] = (self.batch, self.tokens, self.channels), self.dtype
            if self.form == "power":
                found["coeff"] = (self.width, self.degree), exact
            if self.weighted:
                found["weight"] = (self.batch, self.tokens), exact
        if self.op != "state":
            width = self.channels if self.heads == 1 else self.heads
            found["gate"] = (self.batch, self.tokens, width), self.dtype
        if self.op in ("readout", "update"):
            found |= self.state()
        return found

    def state(self):
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = (self.batch, 1, self.channels)
        return dict(zip(STATE, ((shape, exact), (shape, exact), (shape[:2], torch.float64)), strict=True))

    def output(self):
        """(shape, dtype) of the output that has a gradient."""
        if self.op == "state":
            return self.state()["total"]
        return (self.batch, self.tokens, self.channels), self.dtype

    @property
    def bytes_moved(self):
        """Every input is read once and every output written once. Backward: inputs and gradients of outputs are read,
        gradients of inputs written."""

        def size(tensors):
            return sum(prod(shape) * dtype.itemsize for shape, dtype in tensors)

        inputs, output = self.inputs(), [self.output()]
        outputs = self.state().values() if self.op == "state" else output
        in_place = self.state().values() if self.op == "update" else ()
        once = size(inputs.values()) + size(outputs) + size(in_place)
        grads = size(inputs.values()) + size(output) + size(inputs[name] for name in inputs if name not in CONSTANT)
        return {"forward": once, "backward": grads, "both": once + grads}[self.passes]

    def tensors(self):
        """Values for the inputs: those of a state that has seen a thousand tokens, weights from 0 to 1, the rest normal."""
        tensors = {}
        for name, (shape, dtype) in self.inputs().items():
            tensors[name] = torch.empty(shape, dtype=dtype, device=self.device)
            fill = {"weight": lambda t: t.uniform_(), "residual": lambda t: t.zero_(), "count": lambda t: t.fill_(1000)}
            fill.get(name, lambda t: t.normal_())(tensors[name])
        return tensors

    def ours(self, u=None, coeff=None, gate=None, weight=None, state=None):
        polynomial = {"form": self.form, "degree": self.degree}
        if self.op == "state":
            return polynomial_state(u, coeff, weight=weight, **polynomial).total
        if self.op == "readout":
            return polynomial_readout(gate, state, form=self.form, n_sel_heads=self.heads)
        if self.op == "update":
            y = polynomial_update(u, gate, state, coeff, **polynomial, n_sel_heads=self.heads)
            return y, state.total
        causal = self.op == "causal_mix"
        return polynomial_mix(u, gate, coeff, **polynomial, n_sel_heads=self.heads, weight=weight, causal=causal)

    def plain(self, u, coeff=None, gate=None, running_mean=baselines.masked_running_mean):
        phi = baselines.features(u, coeff, self.form, self.degree)
        if self.op == "state":
            return phi.sum(dim=1, keepdim=True)
        return baselines.gated(gate, running_mean(phi) if self.op == "causal_mix" else baselines.mean(phi), self.form)

    def cumsum(self, **tensors):
        return self.plain(**tensors, running_mean=baselines.running_mean)

    def authors(self, u, coeff, gate=None, weight=None):
        mask = "causal" if self.op == "causal_mix" else weight
        return baselines.authors_op(u, coeff, gate, self.degree, self.heads, mask)

    def contender(self, function, sets):
        make = {"forward": forward, "backward": backward, "both": training_step}[self.passes]
        if not self.differentiates:
            sets = [with_state(**tensors) for tensors in sets]  # one and the same State for all its updates
        return make(lambda **tensors: function(**with_state(**tensors)), sets, self.bytes_moved)

    def setup(self, sets=1):
        sets = [self.tensors() for _ in range(sets)]
        tensors = sets[0]

        def copy():
            target = torch.empty_like(tensors["u"])
            return Contender(lambda: target.copy_(tensors["u"]), bytes_moved=2 * target.nbytes)

        return Setup(
            tensors,
            {
                OURS: lambda: self.contender(self.ours, sets),
                "plain": lambda: self.contender(self.plain, sets),
                "compiled": lambda: self.contender(torch.compile(self.plain, dynamic=False), sets),
                "cumsum": lambda: self.contender(self.cumsum, sets),
                "authors": lambda: self.contender(self.authors, sets),
                "sum": lambda: Contender(tensors["u"].sum, bytes_moved=tensors["u"].nbytes),
                "copy": copy,
                "float32": lambda: self.contender(self.ours, [{name: t.float() for name, t in tensors.items()}]),
            },
            lambda: self.expected(tensors),
        )

    def expected(self, tensors):
        """What the definition in plain torch gives in float64, one sequence after the other to spare memory."""
        shape, dtype = self.output()
        grad = output_grad(shape, dtype, self.device).double() if self.differentiates else None
        pieces = []
        for i in range(self.batch):
            one = slice(i, i + 1)
            inputs = {name: (t if name == "coeff" else t[one]).double() for name, t in tensors.items()}
            pieces.append(self.exact(inputs, grad if grad is None else grad[one]))
        joined = ((name, [piece[name] for piece in pieces]) for name in pieces[0])
        return tuple(sum(parts) if name == "grad coeff" else torch.cat(parts) for name, parts in joined)

    def exact(self, inputs, grad):
        """{name: tensor} of what the case returns, in its order."""
        if not self.differentiates:
            return dict(enumerate(as_tuple(self.definition(**inputs))))
        inputs, wanted = leaves(inputs)
        output = self.definition(**inputs)
        names = (f"grad {name}" for name in inputs if name not in CONSTANT)
        grads = dict(zip(names, torch.autograd.grad(output, wanted, grad), strict=True))
        return grads if self.passes == "backward" else {"output": output.detach(), **grads}

    def definition(self, u=None, coeff=None, gate=None, weight=None, total=None, residual=None, count=None):
        polynomial, gates = {"form": self.form, "degree": self.degree}, {"form": self.form, "n_sel_heads": self.heads}
        if self.op == "readout":
            return reference.readout(gate, total + residual, count, **gates)
        if self.op == "causal_mix":  # in float64 running sums are exact enough, and linear in tokens
            phi = reference.features(u, coeff, **polynomial)
            return baselines.gated(gate, baselines.running_mean(phi), self.form)
        total_u, count_u = reference.state(u, coeff, **polynomial, weight=weight)
        if self.op == "state":
            return total_u
        if self.op == "mix":
            return reference.readout(gate, total_u, count_u, **gates)
        total = total + residual + total_u
        return reference.readout(gate, total, count + count_u, **gates), total

    def sizes(self, tensors):
        """What extra memory is held against."""
        state = polynomial_state(**tensors, form=self.form, degree=self.degree)
        return {"state": sum(t.nbytes for t in state.state_dict().values()), "u": tensors["u"].nbytes}

    def measure(self, clock, settings, bandwidth=None):
        return measure_times(self, clock, settings, bandwidth)
