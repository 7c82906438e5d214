"""What benchmarks of a few layers and image models share: the cases, how contenders are compared, and the command."""

import argparse
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
MODELS = ("power", "product")


def layer_case(options, tokens):
    """A layer and its inputs."""
    return PoM(DIM, expand=EXPAND, **options), (torch.randn(1, tokens, DIM),)


def model_case(mixer):
    """A model that is not the fresh one, whose output is zero, and its inputs: images, times, labels."""
    model = image_dit("S/2", in_channels=4, n_classes=10, image_size=32, mixer=mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([100.0, 900.0]), torch.tensor([3, 4]))


def cases(lengths):
    """By name: a function that gives a module and its inputs, and the arguments of the function."""
    found = {
        f"layer, {name}, {tokens} tokens": (layer_case, options, tokens)
        for name, options in LAYERS.items()
        for tokens in lengths
    }
    return found | {f"image model S/2, {mixer}, batch 2": (model_case, mixer) for mixer in MODELS}


def compare(name, calls, base, ours, bound, describe, settings):
    """Time functions by turns. Prints one's share of the base against its bound, and returns the JSON of the case.

    calls: {contender: function}; base, ours: two of them; describe: of all ratios to the base, what is printed.
    """
    contenders, clock = {which: Contender(call) for which, call in calls.items()}, HostClock()
    for contender in contenders.values():
        clock.ready(contender)
    times = interleave(contenders, clock, settings)
    found = ratios(times, base)["warm"]
    print(f"{name:44} {describe(found)}   {'reached' if found[ours] <= bound else 'MISSED'}", flush=True)
    medians = {which: summary(seconds, None, "warm")["median_ms"] for which, seconds in times.items()}
    return {"case": name, "ratios": found, "median_ms": medians, "bound": bound, "rounds": len(times[base])}


def command(program, description, arguments, all_cases, measure, options=()):
    """The command line of such a benchmark: measures every case that is asked for, and saves after each.

    measure: of a name, what a case's function gives, Settings and the parsed arguments, the JSON of the case.
    options: (flag, keywords of add_argument) beside those that all have.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument("--case", nargs="+", help="parts of names")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a case")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    for flag, keywords in options:
        parser.add_argument(flag, **keywords)
    given = parser.parse_args(arguments)
    chosen = {name: case for name, case in all_cases.items() if not given.case or any(c in name for c in given.case)}
    if not chosen:
        parser.error(f"--case: nothing is called {given.case}; there are {', '.join(all_cases)}")
    if given.json and not Path(given.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(given.json).parent}")
    content = {"machine": machine(), "cases": []}
    print(machine_line(content["machine"]), flush=True)
    for name, (build, *details) in chosen.items():
        torch.manual_seed(0)
        settings = Settings(seconds=given.seconds, least_rounds=3, most_rounds=60)
        content["cases"].append(measure(name, *build(*details), settings, given))
        if given.json:
            save(content, given.json)
    return 0
