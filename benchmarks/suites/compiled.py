"""What torch.compile makes of layers and image models beside eager mode, forward and forward with backward.

    python -m benchmarks.compiled --json benchmarks/results/NAME.json

Contenders take turns. Their results are compared before anything is timed.
"""

import sys

import torch

from . import few_cases

TOKENS = (256, 4096)
PASSES = ("forward", "backward")
BOUND = 1.02  # times eager mode: never slower, but for what medians of one program differ by


def with_passes(passes, build, *details):
    return passes, *build(*details)


def cases():
    """By name: a function that gives the passes that are timed, a module and its inputs, and the function's arguments."""
    found = few_cases.cases(TOKENS)
    return {f"{name}, {p}": (with_passes, p, *case) for name, case in found.items() for p in PASSES}


def timed(passes, function, module, given):
    """What is timed: a call without gradients; or one with them, and the gradients of all parameters."""
    if passes == "forward":
        return torch.no_grad()(lambda: [function(*given)])
    weights, grad = list(module.parameters()), torch.ones_like(module(*given))

    def run():
        y = function(*given)
        return [y.detach(), *torch.autograd.grad(y, weights, grad)]

    return run


def measure(name, passes, module, given, settings, backend="inductor"):
    """The JSON of one case."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    calls = {
        which: timed(passes, function, module, given) for which, function in (("eager", module), ("compiled", compiled))
    }
    for ours, theirs in zip(calls["compiled"](), calls["eager"](), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), f"{name}: compiled it gives something else"
    describe = lambda ratios: f"{ratios['compiled']:5.2f} x eager mode"
    return few_cases.compare(name, calls, "eager", "compiled", BOUND, describe, settings)


def main(arguments=None):
    def run(name, passes, module, given, settings, options):
        return measure(name, passes, module, given, settings, options.backend)

    backend = "--backend", {"default": "inductor", "help": "of torch.compile"}
    return few_cases.command("compiled", __doc__.split("\n")[0], arguments, cases(), run, [backend])


if __name__ == "__main__":
    sys.exit(main())
