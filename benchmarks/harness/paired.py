"""A few layers and image models, and two or more ways to call each, compared side by side against a bound."""

import torch

from pom_ext import PoM
from pom_ext.models import image_dit

from . import report
from .command import parse, suite_parser
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
    """A model, with noise on its weights since a fresh one returns zeros, and its inputs: images, times, labels."""
    model = image_dit("S/2", in_channels=4, n_classes=10, image_size=32, mixer=mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([100.0, 900.0]), torch.tensor([3, 4]))


def cases(lengths):
    """{name: (build, *arguments)}: build(*arguments) returns a module and its inputs."""
    layers = {
        f"layer, {name}, {tokens} tokens": (layer_case, options, tokens)
        for name, options in LAYERS.items()
        for tokens in lengths
    }
    return layers | {f"image model S/2, {mixer}, batch 2": (model_case, mixer) for mixer in MODELS}


def compare(name, calls, base, ours, bound, describe, settings):
    """Time functions by turns, print the ratio of `ours` to `base` against its bound, and return the JSON of the case.

    calls: {contender: function}; base, ours: two of the contenders; describe: {contender: ratio to base} -> printed
    text.
    """
    contenders, clock = {which: Contender(call) for which, call in calls.items()}, HostClock()
    for contender in contenders.values():
        clock.ready(contender)
    times = interleave(contenders, clock, settings)
    found = ratios(times, base)["warm"]
    print(f"{name:44} {describe(found)}   {'reached' if found[ours] <= bound else 'MISSED'}", flush=True)
    medians = {which: summary(seconds, None, "warm")["median_ms"] for which, seconds in times.items()}
    return {"case": name, "ratios": found, "median_ms": medians, "bound": bound, "rounds": len(times[base])}


def run(suite, arguments, all_cases, measure, options=()):
    """Run such a suite: measure every chosen case and save after each. Returns the exit status.

    all_cases: {name: (build, *arguments)}; measure(name, *built, settings, parsed options) -> JSON of the case, where
    `built` is what build(*arguments) returned; options: (flag, keywords of add_argument) of the suite's own.
    """
    parser = suite_parser(suite)
    parser.add_argument("--case", nargs="+", help="parts of names")
    parser.add_argument("--seconds", type=float, default=6.0, help="time to measure each case")
    for flag, keywords in options:
        parser.add_argument(flag, **keywords)
    given = parse(parser, arguments)
    chosen = {name: case for name, case in all_cases.items() if not given.case or any(c in name for c in given.case)}
    if not chosen:
        parser.error(f"--case: nothing is called {given.case}; there are {', '.join(all_cases)}")
    content = report.begin(cases=[])
    for name, (build, *details) in chosen.items():
        torch.manual_seed(0)
        settings = Settings(seconds=given.seconds, least_rounds=3, most_rounds=60)
        content["cases"].append(measure(name, *build(*details), settings, given))
        report.save(content, given.json)
    return 0
