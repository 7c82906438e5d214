"""The cases on the host: all by name, with their baselines and their targets."""

import torch

from .layers import AUTHORS, LayerCase
from .measure import Target
from .memory import MemoryCase
from .ops import OpCase

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MEMORY = ("sum", "copy")
FORMULA = ("plain", "compiled")
FORMS = (("power", 3), ("product", 2))
OTHER_DEGREES = (("power", 1), ("power", 2), ("power", 4), ("product", 3), ("product", 4))
LAYERS = (("power", 3, 1), ("power", 3, 8), ("product", 2, 1))
MANY_TOKENS = 32768  # of 1,024 channels: more than any cache holds

TARGETS = {
    ("forward", "power", 3, 4096, FP32): (Target("plain", at_least=80), Target("compiled", at_least=40)),
    ("forward", "power", 3, MANY_TOKENS, FP32): (Target("sum", at_least=0.7),),
    ("forward", "product", 2, 4096, FP32): (Target("plain", at_least=10), Target("compiled", at_least=10)),
    ("backward", "power", 3, 4096, FP32): (Target("plain", at_least=30),),
    ("backward", "product", 2, 4096, FP32): (Target("plain", at_least=8),),
}
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
HALF_PRECISION = (Target("float32", at_least=1),)  # half the bytes, so at least as fast
FEW_STATES = (Target("state", at_most=128),)  # extra memory in multiples of the state, for any number of tokens


def op_cases():
    for passes, memory in (("forward", MEMORY), ("backward", ("copy",))):
        for form, degree in FORMS:
            for tokens in (256, 4096, MANY_TOKENS):
                targets = TARGETS.get((passes, form, degree, tokens, FP32), ())
                formula = () if passes == "backward" and tokens == MANY_TOKENS else FORMULA  # takes minutes there
                yield OpCase("state", form, degree, tokens, passes=passes, against=formula + memory, targets=targets)
            for dtype in (BF16, FP16):
                against = ("float32", *memory)
                more = {"passes": passes, "against": against, "targets": HALF_PRECISION}
                yield OpCase("state", form, degree, MANY_TOKENS, dtype=dtype, **more)
        for form, degree in OTHER_DEGREES:
            yield OpCase("state", form, degree, 4096, passes=passes, against=("plain", *memory))
    for form, degree, heads in LAYERS:
        for tokens in (256, 4096):
            yield OpCase("mix", form, degree, tokens, heads=heads, against=(*FORMULA, "copy"))
        yield OpCase("causal_mix", form, degree, 4096, heads=heads, against=("plain", "cumsum", "copy"))


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


def memory_cases():
    for form, heads in PROJECTED:
        for tokens in (4096, MANY_TOKENS):
            yield MemoryCase(LayerCase(form, 3, tokens, heads=heads), targets=(Target("allowed", at_most=1),))
    for form, degree in FORMS:
        for tokens in (4096, MANY_TOKENS):
            yield MemoryCase(OpCase("state", form, degree, tokens), targets=FEW_STATES)


def layer_cases():
    for train in (False, True):
        for form, degree, heads in LAYERS:
            against = ("plain", "attention", "projections", "context projection") + AUTHORS * (form == "power")
            for tokens in (256, 1024, 4096):
                if (form, heads) == ("power", 8):
                    continue  # in projected_cases
                more = ("compiled",) * (tokens == 1024)
                yield LayerCase(form, degree, tokens, train, heads=heads, against=against + more)
            for dtype, tokens in ((BF16, 1024), (FP16, 256)):  # torch's float16 matrix products are slow on most CPUs
                yield LayerCase(form, degree, tokens, train, heads=heads, dtype=dtype, against=against)


CASES = {case.name: case for case in (*op_cases(), *memory_cases(), *layer_cases(), *projected_cases())}
