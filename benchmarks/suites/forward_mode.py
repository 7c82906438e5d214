"""The time of a derivative in a direction (jvp) beside its forward, for layers and image models.

`torch` is torch.func.jvp, `ours` pom_ext.forward_mode.jvp, which leaves out products by zero. Contenders take turns.
"""

import torch

from pom_ext.forward_mode import jvp

from ..harness import paired

TOKENS = (256, 1024, 4096)
BOUND = 2.2  # times the forward


def floating_part(build, *details):
    """(module as a function of its floating-point inputs, these inputs): labels have no derivative."""
    module, inputs = build(*details)
    at = tuple(x for x in inputs if x.is_floating_point())
    return lambda *at: module(*at, *inputs[len(at) :]), at


def cases():
    """{name: (build, *arguments)}: build(*arguments) returns a function and the point to differentiate it at."""
    return {name: (floating_part, *case) for name, case in paired.cases(TOKENS).items()}


@torch.no_grad()
def measure(name, function, at, settings, options=None):
    """The JSON of one case."""
    direction = tuple(torch.randn_like(x) for x in at)
    calls = {
        "forward": lambda: function(*at),
        "ours": lambda: jvp(function, at, direction),
        "torch": lambda: torch.func.jvp(function, at, direction),
    }
    describe = lambda ratios: f"{ratios['ours']:5.2f} x the forward, torch.func.jvp {ratios['torch']:5.2f} x"
    return paired.compare(name, calls, "forward", "ours", BOUND, describe, settings)


def main(arguments=None):
    return paired.run("forward-mode", arguments, cases(), measure)
