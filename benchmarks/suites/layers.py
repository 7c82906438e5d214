"""The layer, on the CPU and on a CUDA device: all cases by name, with their baselines and their targets."""

import torch

from ..harness import checked
from ..harness.baselines import AUTHORS
from ..harness.layer_case import LayerCase
from ..harness.measure import Target

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# On the CPU.
LAYERS = (("power", 3, 1), ("power", 3, 8), ("product", 2, 1))  # form, degree, heads
# A layer of width 512, expansion 2, degree 3. By (form, heads), forward or what training keeps, and tokens.
PROJECTED = {
    ("power", 8): {
        "forward": Target("context projection", at_least=1 / 1.2),
        "store": Target("context projection", at_least=1 / 3.6),
        "recompute": Target("context projection", at_least=1 / 4.6),
    },
    ("product", 1): {
        "forward": Target("projections", at_least=1 / 1.12),
        "store": Target("projections", at_least=1 / 1.15),
    },
}
ATTENTION = {64: 1, 256: 1, 1024: 3.5, 4096: 14}  # times the forward of the power form with heads, at least

# On a CUDA device.
GPU = {"device": "cuda", "clock": "events"}
TOKENS = (64, 256, 1024, 4096, 16384, 65536)


def host_cases():
    for train in (False, True):
        for form, degree, heads in LAYERS:
            against = ("plain", "attention", "projections", "context projection") + AUTHORS * (form == "power")
            for tokens in () if heads == 8 else (256, 1024, 4096):  # with heads they are in projected_cases
                more = ("compiled",) * (tokens == 1024)
                yield LayerCase(form, degree, tokens, train, heads=heads, against=against + more)
            for dtype, tokens in ((BF16, 1024), (FP16, 256)):  # torch's float16 matrix products are slow on most CPUs
                yield LayerCase(form, degree, tokens, train, heads=heads, dtype=dtype, against=against)


def projected_cases():
    """The layer beside its own matrix products, at degree 3 in both forms."""
    for (form, heads), bounds in PROJECTED.items():
        for passes, bound in bounds.items():
            options = {"heads": heads, "train": passes != "forward"}
            options |= {"memory": passes} if options["train"] else {}
            against = ("attention", "projections", "context projection", "the same by oneDNN")
            against += AUTHORS * (form == "power")
            for tokens, faster in ATTENTION.items():
                targets = (bound,) * (tokens >= 1024)
                if form == "power" and not options["train"]:
                    targets += (Target("attention", at_least=faster),)
                if form == "power" and options["train"]:
                    targets += (Target("attention", at_least=1),)
                    targets += tuple(Target(name, at_least=5) for name in AUTHORS if tokens >= 1024)
                yield LayerCase(form, 3, tokens, dtype=FP32, against=against, targets=targets, **options)


def device_cases():
    for train in (False, True):
        for tokens in TOKENS:
            # Attention grows with the square of the tokens.
            targets = tuple(Target(name, at_least=1) for name in ("attention",) * (tokens >= 512) + AUTHORS)
            if tokens >= 16384 and not train:
                targets += (Target("context projection", at_least=1 / 1.25),)
            against = ("attention", "compiled", "context projection", "by blocks", "at once", *AUTHORS)
            power = {"dim": 1024, "heads": 16, "against": against}
            for memory in ("store", "recompute")[: 1 + train]:
                yield LayerCase("power", 3, tokens, train, memory=memory, dtype=BF16, **power, **GPU, targets=targets)
        for batch in (1, 16):
            product = {"dim": 1152, "batch": batch, "against": ("attention", "compiled")}
            yield LayerCase("product", 2, 256, train, dtype=BF16, **product, **GPU)


CASES = {
    "cpu": {case.name: case for case in (*host_cases(), *projected_cases())},
    "cuda": {case.name: case for case in device_cases()},
}


def main(arguments=None):
    return checked.run("layers", CASES, arguments)
