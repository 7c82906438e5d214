"""What a case has to bring, and how it is measured: check, time by turns, compare, hold against the targets."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Contender, interleave, ratios, summary

OURS = "pom_ext"
# In float32 a token within rounding of a kink of the activation may fall on its other side, in plain torch as here; one
# such token among millions makes an error of several 1e-4 in the gradients.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class CheckFailed(Exception):
    """A case computed something else than the plain formula does."""


@dataclass(frozen=True)
class Target:
    """A bound on one ratio of a case, `of` what is compared with.

    Cases of time: the time of a baseline over ours. Cases of memory: our extra memory over another size.
    """

    of: str
    at_least: float | None = None
    at_most: float | None = None

    def judged(self, ratios):
        """The target with what was measured; None where the baseline did not run."""
        measured = ratios.get(self.of)
        reached = None if measured is None else (self.at_least or 0) <= measured <= (self.at_most or float("inf"))
        return {**dataclasses.asdict(self), "measured": measured, "reached": reached}


@dataclass(frozen=True)
class Setup:
    """A case ready to run: its tensors, its contenders (made on demand), and what should come out, in float64."""

    tensors: dict[str, torch.Tensor]
    contenders: dict[str, Callable[[], Contender]]
    expected: Callable[[], tuple[torch.Tensor, ...]]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def output_grads(outputs):
    """The same gradients for all contenders whose outputs have the same shapes."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(output.shape, generator=draw).to(output.dtype) for output in outputs]


def forward(function, inputs, bytes_moved=None):
    return Contender(lambda: function(*inputs), bytes_moved=bytes_moved)


def backward(function, inputs, bytes_moved=None):
    """The gradients of all inputs. The forward that leads to them is not timed."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grads = output_grads(as_tuple(function(*leaves)))
    return Contender(
        lambda *outputs: torch.autograd.grad(outputs, leaves, grads), lambda: as_tuple(function(*leaves)), bytes_moved
    )


def training_step(function, inputs, parameters):
    """Forward, and the gradients of inputs and parameters: (*outputs, *gradients)."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grads = output_grads(as_tuple(function(*leaves)))

    def step():
        outputs = as_tuple(function(*leaves))
        return *outputs, *torch.autograd.grad(outputs, [*leaves, *parameters], grads)

    return Contender(step)


def check(case, results, expected):
    """The largest error of any tensor: root mean square, relative to that of what is expected. Raises CheckFailed."""
    error = 0.0
    for result, exact in zip(as_tuple(results), expected, strict=True):
        if result.shape != exact.shape:
            raise CheckFailed(f"{case.name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
        error = max(error, ((result.double() - exact).norm() / exact.norm()).nan_to_num(torch.inf).item())
    allowed = TOLERANCE[case.dtype]
    if error > allowed:
        raise CheckFailed(f"{case.name}: error {error:.2g} against the plain formula, at most {allowed} is allowed")
    return {"error": error, "allowed": allowed}


def measure_times(case, clock, settings):
    """The result of a case of times, as it stands in the JSON file. Raises CheckFailed."""
    torch.manual_seed(0)
    torch.compiler.reset()  # the many shapes of one function would exceed torch's limit of recompilations
    contenders, failed = {}, {}
    with torch.inference_mode(not case.differentiates):
        setup = case.setup()
        ours = contenders[OURS] = setup.contenders[OURS]()
        checked = check(case, ours.call(), setup.expected())
        for name in case.against:
            try:
                contender = setup.contenders[name]()
                contender.call()  # compiles, starts threads, takes memory from the system
                contenders[name] = contender
            except Exception as error:  # noqa: BLE001 -- a baseline that does not run here is reported; the others go on
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        times = interleave(contenders, clock, settings)
    cold = {name: cold for name, (cold, _) in ratios(times, OURS).items()}
    warm = {name: warm for name, (_, warm) in ratios(times, OURS).items()}
    return {
        "kind": "time",
        "shapes": {name: list(tensor.shape) for name, tensor in setup.tensors.items()},
        "check": checked,
        "contenders": {name: summary(times[name], contenders[name].bytes_moved) for name in times},
        "failed": failed,
        "ratios": warm,
        "cold_ratios": cold,
        "targets": [target.judged(warm) for target in case.targets],
    }
