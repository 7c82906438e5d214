"""Where each form wins: time of layers and of whole image models beside attention, from 256 to 65,536 tokens.

    python -m benchmarks.crossover --json benchmarks/results/NAME.json --plot docs/crossover.png

Contenders of a length take turns. A call that would take longer than --limit seconds, going by the two lengths before,
is not measured, and listed so. The break-even is the length from which on a form was faster than attention wherever both
were measured. What the layers keep of a token for their gradients stands beside their times.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from pom_ext import PoM
from pom_ext.media.figures import save_crossover
from pom_ext.models import blocks, image_dit

from .baselines import Attention
from .run import machine, machine_line, save

SIZES = {"S/2": (384, 6), "B/2": (768, 12), "XL/2": (1152, 16)}  # width and heads
LEAST_CALLS = 3  # at the shortest length
TOKENS = (256, 1024, 4096, 16_384, 65_536)
FORMS = {
    "power, heads": {"form": "power", "degree": 3, "heads": True},
    "power": {"form": "power", "degree": 3},
    "product": {"form": "product", "degree": 2},
}
NAMES = (*FORMS, "attention")
PASSES = ("forward", "forward+backward")


def make_layer(name, dim, heads, layer=PoM):
    if name == "attention":
        return Attention(dim, heads) if layer is PoM else blocks.Attention(dim, heads)
    options = dict(FORMS[name])
    return layer(dim, n_sel_heads=heads if options.pop("heads", False) else 1, **options)


class Layers:
    """The layers of a size, side by side."""

    def __init__(self, size):
        self.dim, heads = SIZES[size]
        self.layers = {name: make_layer(name, self.dim, heads) for name in NAMES}

    def inputs(self, tokens):
        return (torch.randn(1, tokens, self.dim),)

    def named(self, name):
        return self.layers[name]


class Models:
    """The image model of a size, and the mixers that it takes by turns: everything else is there once."""

    def __init__(self, size):
        self.model = image_dit(size, in_channels=4, n_classes=10, image_size=32)
        dim, heads = SIZES[size]
        kinds = {name: blocks.PolynomialMixer for name in FORMS}
        self.mixers = {
            name: [make_layer(name, dim, heads, kinds.get(name)) for _ in self.model.blocks] for name in NAMES
        }

    def inputs(self, tokens):
        """An image of so many patches."""
        side = 2 * round(tokens**0.5)
        return torch.randn(1, 4, side, side), torch.tensor([500.0]), torch.tensor([3])

    def named(self, name):
        for block, mixer in zip(self.model.blocks, self.mixers[name], strict=True):
            block.mixer = mixer
        return self.model


def run(module, inputs, passes):
    """Seconds of one call."""
    with torch.inference_mode(passes == "forward"):
        start = time.perf_counter()
        y = module(*inputs)
        if passes != "forward":
            torch.autograd.grad(y.sum(), list(module.parameters()), allow_unused=True)
        return time.perf_counter() - start


def predicted(seconds):
    """Of four times the tokens, from the medians of the lengths so far: as the last step grew, and at least four times."""
    if not seconds:
        return 0
    return seconds[-1] * max(4, seconds[-1] / seconds[-2] if len(seconds) > 1 else 4)


def measure(what, size, contenders, passes, options):
    """Median seconds by contender, a list over the lengths. None: not measured, and neither are longer ones."""
    medians = {name: [] for name in NAMES}
    for tokens in options.tokens:
        torch.manual_seed(0)
        going = [n for n in NAMES if None not in medians[n] and predicted(medians[n]) <= options.limit]
        inputs, seconds = contenders.inputs(tokens), {name: [] for name in going}
        start, least = time.perf_counter(), 1 if medians[NAMES[0]] else LEAST_CALLS
        while going and (len(seconds[going[0]]) < least or time.perf_counter() - start < options.seconds):
            for name in going:
                module = contenders.named(name)
                if not seconds[name] and predicted(medians[name]) < 1:
                    run(module, inputs, passes)  # the first call takes memory from the system
                seconds[name].append(run(module, inputs, passes))
        for name in NAMES:
            medians[name].append(statistics.median(seconds[name]) if name in going else None)
        row = "  ".join(shown(name, medians[name][-1], medians["attention"][-1]) for name in NAMES)
        print(f"{what:6}{size:5}{passes:17}{tokens:7} tokens  {row}", flush=True)
    return medians


def shown(name, seconds, attention):
    """One contender of a line of the table."""
    if seconds is None:
        return f"{name} not measured"
    ratio = "" if attention is None or name == "attention" else f" ({attention / seconds:.2f}x)"
    return f"{name} {1e3 * seconds:.4g} ms{ratio}"


def break_even(tokens, seconds, attention):
    """The length from which on a form was faster than attention wherever both were measured, or None."""
    both = [(n, a, b) for n, a, b in zip(tokens, seconds, attention) if a is not None and b is not None]
    first = None
    for n, ours, theirs in both:
        first = (first or n) if ours < theirs else None
    return first


def kept_bytes(module, x):
    """Bytes of a token that a layer keeps for its gradients, beside its input and its parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    return sum(size for size, _ in kept.values()) / x.shape[1]


def memory(size, tokens=4096):
    """What layers keep of a token, by contender and the layer's option."""
    dim, heads = SIZES[size]
    rows = {"attention": kept_bytes(Attention(dim, heads), torch.randn(1, tokens, dim, requires_grad=True))}
    for name in FORMS:
        for way in ("store", "recompute"):
            layer = make_layer(name, dim, heads)
            layer.memory = way
            rows[f"{name}, {way}"] = kept_bytes(layer, torch.randn(1, tokens, dim, requires_grad=True))
    return {name: round(value) for name, value in rows.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossover", description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=("layer", "model"), default=("layer", "model"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=TOKENS, help="lengths, each a square, four times the last"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of a length; at least one call of each, three of the first"
    )
    parser.add_argument("--limit", type=float, default=15.0, help="longest call that is measured, in seconds")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there (PNG)")
    options = parser.parse_args(arguments)
    for name in ("json", "plot"):
        given = getattr(options, name)
        if given and not Path(given).parent.is_dir():
            parser.error(f"--{name}: there is no folder {Path(given).parent}")
    content = {"machine": machine(), "limit_seconds": options.limit, "tokens": list(options.tokens), "cases": []}
    print(machine_line(content["machine"]), flush=True)
    content["kept_bytes_per_token"] = {size: memory(size) for size in options.sizes}
    for size, rows in content["kept_bytes_per_token"].items():
        print(f"layer {size}: kept bytes per token: " + ", ".join(f"{n} {b}" for n, b in rows.items()), flush=True)
    for what in options.what:
        for size in options.sizes:
            contenders = {"layer": Layers, "model": Models}[what](size)
            for passes in PASSES:
                seconds = measure(what, size, contenders, passes, options)
                even = {n: break_even(options.tokens, seconds[n], seconds["attention"]) for n in FORMS}
                print(f"{what:6}{size:5}{passes:17}faster than attention from: {even}", flush=True)
                case = {"what": what, "size": size, "passes": passes, "seconds": seconds, "break_even": even}
                content["cases"].append(case)
                if options.json:
                    save(content, options.json)
            del contenders  # before the next ones are made
    if options.plot:
        save_crossover(content, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
