"""How a case is measured: check its result, time the contenders by turns, compare, judge the targets."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Contender, interleave, other, ratios, summary

OURS = "pom_ext"
COPY_BANDWIDTH, MICROSECONDS = "copy bandwidth", "microseconds"  # targets that are not ratios to a contender
# In float32, rounding may move a token across a kink of the activation, in plain torch as here; one such token among
# millions makes an error of several 1e-4 in the gradients.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CONSTANT = ("weight", "residual", "count")  # inputs without a gradient


class CheckFailed(Exception):
    """The result of a case differs from that of the plain formula."""


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a case.

    For times, `of` is a baseline (its time over ours), COPY_BANDWIDTH (our bytes per second over those of a plain copy)
    or MICROSECONDS (our time). For memory it is a size, and the figure is our extra memory over that size.
    """

    of: str
    at_least: float | None = None
    at_most: float | None = None

    def judged(self, figures):
        """The target as a dict with the measured figure, None if the baseline did not run."""
        measured = figures.get(self.of)
        reached = None if measured is None else (self.at_least or 0) <= measured <= (self.at_most or float("inf"))
        return {**dataclasses.asdict(self), "measured": measured, "reached": reached}


@dataclass(frozen=True)
class Setup:
    """A case ready to run: its tensors, its contenders (made on demand), and the expected outputs in float64."""

    tensors: dict[str, torch.Tensor]
    contenders: dict[str, Callable[[], Contender]]
    expected: Callable[[], tuple[torch.Tensor, ...]]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def output_grad(shape, dtype, device):
    """The same gradient for all contenders whose outputs have the same shape."""
    draw = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=draw, device=device).to(dtype)


def leaves(inputs):
    """(the inputs, with a fresh leaf for each that has a gradient; the leaves)"""
    inputs = {name: t if name in CONSTANT else t.detach().requires_grad_() for name, t in inputs.items()}
    return inputs, [tensor for name, tensor in inputs.items() if name not in CONSTANT]


def forward(function, sets, bytes_moved=None):
    """A contender that calls the function, with inputs taken by turns from `sets`."""
    turns = itertools.cycle(sets)
    return Contender(lambda inputs: function(**inputs), lambda: (next(turns),), bytes_moved)


def backward(function, sets, bytes_moved=None):
    """A contender that computes the gradients of all inputs. Its forward is not timed."""
    inputs, wanted = leaves(sets[0])
    output = function(**inputs)
    grad = output_grad(output.shape, output.dtype, output.device)
    return Contender(
        lambda output: torch.autograd.grad(output, wanted, grad), lambda: (function(**inputs),), bytes_moved
    )


def training_step(function, sets, bytes_moved=None, parameters=()):
    """A contender that computes the outputs and the gradients of inputs and parameters: (*outputs, *gradients)."""
    inputs, wanted = leaves(sets[0])
    outputs = as_tuple(function(**inputs))
    grads = [output_grad(output.shape, output.dtype, output.device) for output in outputs]

    def step():
        outputs = as_tuple(function(**inputs))
        return *outputs, *torch.autograd.grad(outputs, [*wanted, *parameters], grads)

    return Contender(step, bytes_moved=bytes_moved)


def check(case, results, expected):
    """The largest error of any tensor, relative to the norm of the expected tensor. Raises CheckFailed."""
    error = 0.0
    for result, exact in zip(as_tuple(results), expected, strict=True):
        if result.shape != exact.shape:
            raise CheckFailed(f"{case.name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
        error = max(error, ((result.double() - exact).norm() / exact.norm()).nan_to_num(torch.inf).item())
    allowed = TOLERANCE[case.dtype]
    if error > allowed:
        raise CheckFailed(f"{case.name}: error {error:.2g} against the plain formula, at most {allowed} is allowed")
    return {"error": error, "allowed": allowed}


def measure_times(case, clock, settings, bandwidth=None):
    """The result of a timed case, as in the JSON file. Raises CheckFailed.

    bandwidth: bytes per second of a plain copy, to compare those of the case with; or None.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # the many shapes of one function would exceed torch's limit of recompilations
    contenders, failed = {}, {}
    with torch.inference_mode(not case.differentiates):
        setup = case.setup(clock.sets(case.bytes_moved))
        expected = setup.expected()  # first, since a call may change its inputs
        ours = contenders[OURS] = setup.contenders[OURS]()
        checked = check(case, ours.call(), expected)
        del expected
        clock.ready(ours)
        for name in case.against:
            try:
                contender = setup.contenders[name]()
                clock.ready(contender)
                contenders[name] = contender
            except Exception as error:  # noqa: BLE001 -- a baseline that does not run is reported; the others go on
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        times = interleave(contenders, clock, settings)
    compared = ratios(times, OURS)
    rows = {name: summary(times[name], contenders[name].bytes_moved, clock.judged) for name in times}
    figures = compared[clock.judged] | {MICROSECONDS: 1e3 * rows[OURS]["median_ms"]}
    if bandwidth and case.bytes_moved:
        for row in rows.values():
            row["share_of_copy"] = row["bytes_per_second"] / bandwidth
        figures[COPY_BANDWIDTH] = rows[OURS]["share_of_copy"]
    return {
        "kind": "time",
        "clock": case.clock,
        "judged": clock.judged,
        "bytes_moved": case.bytes_moved,
        "shapes": {name: list(tensor.shape) for name, tensor in setup.tensors.items()},
        "check": checked,
        "contenders": rows,
        "failed": failed,
        "ratios": compared[clock.judged],
        f"{other(clock.judged)}_ratios": compared[other(clock.judged)],
        "targets": [target.judged(figures) for target in case.targets],
    }
