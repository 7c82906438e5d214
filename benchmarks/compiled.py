"""What torch.compile makes of layers and image models beside eager mode, forward and forward with backward.

    python -m benchmarks.compiled --json benchmarks/results/NAME.json

Contenders take turns. Their results are compared before anything is timed.
"""

import argparse
import sys
from pathlib import Path

import torch

from pom_ext import PoM
from pom_ext.models import image_dit

from .run import machine, machine_line, save
from .timing import Contender, HostClock, Settings, interleave, ratios, summary

DIM, EXPAND = 512, 2
LAYERS = {
    "power, 8 heads": {"form": "power", "degree": 3, "n_sel_heads": 8},
    "power": {"form": "power", "degree": 3},
    "product": {"form": "product", "degree": 2},
}
TOKENS = (256, 4096)
MODELS = ("power", "product")
PASSES = ("forward", "backward")
BOUND = 1.02  # times eager mode: never slower, but for what medians of one program differ by


def layer_case(options, tokens):
    return PoM(DIM, expand=EXPAND, **options), (torch.randn(1, tokens, DIM),)


def model_case(mixer):
    model = image_dit("S/2", in_channels=4, n_classes=10, image_size=32, mixer=mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([100.0, 900.0]), torch.tensor([3, 4]))


def cases():
    """By name: which passes are timed, a function that gives a module and its inputs, and the arguments of the function."""
    built = {
        f"layer, {name}, {tokens} tokens": (layer_case, options, tokens)
        for name, options in LAYERS.items()
        for tokens in TOKENS
    }
    built |= {f"image model S/2, {mixer}, batch 2": (model_case, mixer) for mixer in MODELS}
    return {f"{name}, {passes}": (passes, *case) for name, case in built.items() for passes in PASSES}


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
    contenders, clock = {which: Contender(call) for which, call in calls.items()}, HostClock()
    for contender in contenders.values():
        clock.ready(contender)
    for ours, theirs in zip(calls["compiled"](), calls["eager"](), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), f"{name}: compiled it gives something else"
    times = interleave(contenders, clock, settings)
    found = ratios(times, "eager")["warm"]
    verdict = "reached" if found["compiled"] <= BOUND else "MISSED"
    print(f"{name:44} {found['compiled']:5.2f} x eager mode   {verdict}", flush=True)
    medians = {which: summary(seconds, None, "warm")["median_ms"] for which, seconds in times.items()}
    return {"case": name, "ratios": found, "median_ms": medians, "bound": BOUND, "rounds": len(times["eager"])}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", help="parts of names")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a case, once it is compiled")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    chosen = {name: case for name, case in cases().items() if not options.case or any(c in name for c in options.case)}
    if not chosen:
        parser.error(f"--case: nothing is called {options.case}; there are {', '.join(cases())}")
    if options.json and not Path(options.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(options.json).parent}")
    content = {"machine": machine(), "cases": []}
    print(machine_line(content["machine"]), flush=True)
    for name, (passes, build, *details) in chosen.items():
        torch.manual_seed(0)
        settings = Settings(seconds=options.seconds, least_rounds=3, most_rounds=60)
        content["cases"].append(measure(name, passes, *build(*details), settings, options.backend))
        if options.json:
            save(content, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
