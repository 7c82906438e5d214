"""Cases of the ops: time, and peak memory."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pom_ext import polynomial_mix, polynomial_state, reference

from . import baselines
from .measure import OURS, Setup, Target, backward, check, forward, measure_times
from .timing import Contender


def short(dtype):
    return str(dtype).removeprefix("torch.")


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True)
class OpCase:
    """One op on random tokens: u (batch, tokens, width), in product form (batch, tokens, degree * width).

    op: "state" (and the division that makes it a mean), "state_backward", "mix", "causal_mix".
    """

    op: str
    form: str
    degree: int
    tokens: int
    width: int = 1024
    heads: int = 1
    dtype: torch.dtype = torch.float32
    batch: int = 1
    against: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()

    @property
    def name(self):
        heads = f"-heads{self.heads}" if self.heads > 1 else ""
        return f"{self.op}-{self.form}{self.degree}{heads}-N{self.tokens}-E{self.width}-{short(self.dtype)}"

    @property
    def differentiates(self):
        return self.op == "state_backward"

    @property
    def channels(self):
        return self.width * (self.degree if self.form == "product" else 1)

    def tensors(self):
        shapes = {"u": (self.batch, self.tokens, self.channels)}
        if self.form == "power":
            shapes["coeff"] = (self.width, self.degree)
        if self.op in ("mix", "causal_mix"):
            shapes["gate"] = (self.batch, self.tokens, self.channels if self.heads == 1 else self.heads)
        return {name: torch.empty(shape, dtype=self.dtype).normal_() for name, shape in shapes.items()}

    def bytes_moved(self, tensors):
        """Every input is read once; u's gradient, or an output of every token, is written once."""
        written = 0 if self.op == "state" else tensors["u"].nbytes
        return nbytes(tensors) + written

    def ours(self, u, coeff=None, gate=None):
        polynomial = {"coeff": coeff, "form": self.form, "degree": self.degree}
        if gate is None:
            return polynomial_state(u, **polynomial).mean()
        return polynomial_mix(u, gate, **polynomial, n_sel_heads=self.heads, causal=self.op == "causal_mix")

    def plain(self, u, coeff=None, gate=None, running_mean=baselines.masked_running_mean):
        phi = baselines.features(u, coeff, self.form, self.degree)
        h = running_mean(phi) if self.op == "causal_mix" else baselines.mean(phi)
        return h if gate is None else baselines.gated(gate, h, self.form)

    def cumsum(self, **tensors):
        return self.plain(**tensors, running_mean=baselines.running_mean)

    def contender(self, function, tensors):
        make = backward if self.differentiates else forward
        return make(
            lambda *values: function(**dict(zip(tensors, values, strict=True))),
            tensors.values(),
            self.bytes_moved(tensors),
        )

    def setup(self):
        tensors = self.tensors()
        u, target = tensors["u"], torch.empty_like(tensors["u"])
        return Setup(
            tensors,
            {
                OURS: lambda: self.contender(self.ours, tensors),
                "plain": lambda: self.contender(self.plain, tensors),
                "compiled": lambda: self.contender(torch.compile(self.plain, dynamic=False), tensors),
                "cumsum": lambda: self.contender(self.cumsum, tensors),
                "sum": lambda: Contender(u.sum, bytes_moved=u.nbytes),
                "copy": lambda: Contender(lambda: target.copy_(u), bytes_moved=2 * u.nbytes),
                "float32": lambda: self.contender(self.ours, {name: t.float() for name, t in tensors.items()}),
            },
            lambda: self.expected(tensors),
        )

    def expected(self, tensors):
        """What the definition in plain torch gives, one precision above that of the case."""
        more = torch.float64 if self.dtype in (torch.float32, torch.float64) else torch.float32
        u, *others = (tensor.to(more) for tensor in tensors.values())
        if "gate" in tensors:
            return (self.definition(u, *others),)
        blocks = u.split(1024, dim=1)  # quicker, and no memory for the features of all tokens
        if not self.differentiates:
            return (sum(self.part_of_mean(block, *others) for block in blocks),)
        parts = [backward(self.part_of_mean, [block, *others]).call() for block in blocks]
        grad_u, *grad_coeff = zip(*parts, strict=True)
        return torch.cat(grad_u, dim=1), *(sum(grads) for grads in grad_coeff)

    def part_of_mean(self, u, coeff=None):
        phi = reference.features(u, coeff, form=self.form, degree=self.degree)
        return phi.sum(dim=1, keepdim=True) / self.tokens

    def definition(self, u, *others):
        *coeff, gate = others
        causal = self.op == "causal_mix"
        polynomial = {"form": self.form, "degree": self.degree}
        return reference.mix(u, gate, *coeff, **polynomial, n_sel_heads=self.heads, causal=causal)

    def measure(self, clock, settings):
        return measure_times(self, clock, settings)


def status(field):
    """A size from Linux' account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def peak_growth(case, name, threads):
    """How many bytes of resident memory one call takes at its peak, beyond what was resident before."""
    torch.set_num_threads(threads)
    with torch.inference_mode(not case.differentiates):
        small = dataclasses.replace(case, tokens=64).setup().contenders[name]()
        small.call()  # starts the threads
        contender = case.setup().contenders[name]()
        arguments = contender.prepare()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = status("VmRSS")
        contender.run(*arguments)
        return max(0, status("VmHWM") - before)


@dataclass(frozen=True)
class MemoryCase:
    """Peak memory that one call of an op takes beyond its inputs, each contender in a process of its own."""

    op: OpCase
    against: tuple[str, ...] = ("plain",)
    targets: tuple[Target, ...] = ()

    @property
    def name(self):
        return f"memory-{self.op.name}"

    @property
    def dtype(self):
        return self.op.dtype

    def measure(self, clock, settings):
        torch.manual_seed(0)
        with torch.inference_mode(not self.op.differentiates):
            setup = self.op.setup()
            ours = setup.contenders[OURS]()
            checked = check(self, ours.call(), setup.expected())
            state = polynomial_state(**setup.tensors, form=self.op.form, degree=self.op.degree)
        sizes = {"state": nbytes(state.state_dict()), "u": setup.tensors["u"].nbytes}
        extra = {}
        for name in (OURS, *self.against):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                extra[name] = child.submit(peak_growth, self.op, name, torch.get_num_threads()).result()
        ratios = {name: extra[OURS] / size for name, size in sizes.items()}
        return {
            "kind": "memory",
            "shapes": {name: list(tensor.shape) for name, tensor in setup.tensors.items()},
            "check": checked,
            "bytes": sizes,
            "contenders": {name: {"extra_bytes": size} for name, size in extra.items()},
            "ratios": ratios,
            "targets": [target.judged(ratios) for target in self.targets],
        }
