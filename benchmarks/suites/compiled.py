"""Layers and image models under torch.compile beside eager mode: the forward, and the forward with all gradients.

Contenders take turns. Their results are compared before anything is timed.
"""

import torch

from ..harness import paired

TOKENS = (256, 4096)
PASSES = ("forward", "backward")
BOUND = 1.02  # times eager mode: not slower, beyond the difference between two medians of one program


def with_passes(passes, build, *details):
    return passes, *build(*details)


def cases():
    """{name: (build, *arguments)}: build(*arguments) returns the passes to time, a module and its inputs."""
    return {f"{name}, {p}": (with_passes, p, *case) for name, case in paired.cases(TOKENS).items() for p in PASSES}


def timed(passes, function, module, given):
    """The function to time: a call without gradients, or a call and the gradients of all parameters."""
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
    return paired.compare(name, calls, "eager", "compiled", BOUND, describe, settings)


def main(arguments=None):
    def run(name, passes, module, given, settings, options):
        return measure(name, passes, module, given, settings, options.backend)

    backend = "--backend", {"default": "inductor", "help": "of torch.compile"}
    return paired.run("compiled", arguments, cases(), run, [backend])
