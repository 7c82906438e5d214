"""What a derivative in a direction (jvp) takes beside the forward that it belongs to: of layers and of image models.

    python -m benchmarks.forward_mode --json benchmarks/results/NAME.json

`torch` is torch.func.jvp, `ours` pom_ext.forward_mode.jvp, which leaves out products by zero. Contenders take turns.
"""

import sys

import torch

from pom_ext.forward_mode import jvp

from . import few_cases

TOKENS = (256, 1024, 4096)
BOUND = 2.2  # times the forward


def of_numbers(build, *details):
    """A module as a function of those inputs that a derivative can be taken of, which labels are not."""
    module, inputs = build(*details)
    at = tuple(x for x in inputs if x.is_floating_point())
    return lambda *at: module(*at, *inputs[len(at) :]), at


def cases():
    """By name: a function that gives what is differentiated, and where, and the function's arguments."""
    return {name: (of_numbers, *case) for name, case in few_cases.cases(TOKENS).items()}


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
    return few_cases.compare(name, calls, "forward", "ours", BOUND, describe, settings)


def main(arguments=None):
    return few_cases.command("forward_mode", __doc__.split("\n")[0], arguments, cases(), measure)


if __name__ == "__main__":
    sys.exit(main())
