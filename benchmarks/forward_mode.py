"""What a derivative in a direction (jvp) takes beside the forward that it belongs to: of layers and of image models.

    python -m benchmarks.forward_mode --json benchmarks/results/NAME.json

`torch` is torch.func.jvp, `ours` pom_ext.forward_mode.jvp, which leaves out products by zero. Contenders take turns.
"""

import argparse
import sys
from pathlib import Path

import torch

from pom_ext import PoM
from pom_ext.forward_mode import jvp
from pom_ext.models import image_dit

from .run import machine, machine_line, save
from .timing import Contender, HostClock, Settings, interleave, ratios, summary

DIM, EXPAND = 512, 2
LAYERS = {
    "power, 8 heads": {"form": "power", "degree": 3, "n_sel_heads": 8},
    "power": {"form": "power", "degree": 3},
    "product": {"form": "product", "degree": 2},
}
TOKENS = (256, 1024, 4096)
MODELS = ("power", "product")
BOUND = 2.2  # times the forward


def layer_case(options, tokens):
    layer = PoM(DIM, expand=EXPAND, **options)
    return layer, (torch.randn(1, tokens, DIM),)


def model_case(mixer):
    model = image_dit("S/2", in_channels=4, n_classes=10, image_size=32, mixer=mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    labels = torch.tensor([3, 4])
    return lambda images, time: model(images, time, labels), (torch.randn(2, 4, 32, 32), torch.tensor([100.0, 900.0]))


def cases():
    """Functions of a name: what is differentiated, and where."""
    found = {
        f"layer, {name}, {tokens} tokens": (layer_case, options, tokens)
        for name, options in LAYERS.items()
        for tokens in TOKENS
    }
    return found | {f"image model S/2, {mixer}, batch 2": (model_case, mixer) for mixer in MODELS}


@torch.no_grad()
def measure(name, function, at, settings):
    """The JSON of one case."""
    direction = tuple(torch.randn_like(x) for x in at)
    contenders = {
        "forward": Contender(lambda: function(*at)),
        "ours": Contender(lambda: jvp(function, at, direction)),
        "torch": Contender(lambda: torch.func.jvp(function, at, direction)),
    }
    clock = HostClock()
    for contender in contenders.values():
        clock.ready(contender)
    times = interleave(contenders, clock, settings)
    found = ratios(times, "forward")["warm"]
    verdict = "reached" if found["ours"] <= BOUND else "MISSED"
    print(
        f"{name:36} {found['ours']:5.2f} x the forward, torch.func.jvp {found['torch']:5.2f} x   {verdict}", flush=True
    )
    medians = {contender: summary(seconds, None, "warm")["median_ms"] for contender, seconds in times.items()}
    return {"case": name, "ratios": found, "median_ms": medians, "bound": BOUND, "rounds": len(times["ours"])}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward_mode", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", help="parts of names")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a case")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    chosen = {name: case for name, case in cases().items() if not options.case or any(c in name for c in options.case)}
    if not chosen:
        parser.error(f"--case: nothing is called {options.case}; there are {', '.join(cases())}")
    if options.json and not Path(options.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(options.json).parent}")
    content = {"machine": machine(), "cases": []}
    print(machine_line(content["machine"]), flush=True)
    for name, (build, *details) in chosen.items():
        torch.manual_seed(0)
        settings = Settings(seconds=options.seconds, least_rounds=3, most_rounds=60)
        content["cases"].append(measure(name, *build(*details), settings))
        if options.json:
            save(content, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
