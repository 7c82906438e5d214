"""The operations, on the CPU and on a CUDA device: all cases by name, with their baselines and their targets."""

import dataclasses

import torch

from ..harness import checked
from ..harness.baselines import AUTHORS
from ..harness.measure import COPY_BANDWIDTH, MICROSECONDS, Target
from ..harness.op_case import OpCase

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# On the CPU.
MEMORY = ("sum", "copy")
FORMULA = ("plain", "compiled")
FORMS = (("power", 3), ("product", 2))
OTHER_DEGREES = (("power", 1), ("power", 2), ("power", 4), ("product", 3), ("product", 4))
MIXES = (("power", 3, 1), ("power", 3, 8), ("product", 2, 1))  # form, degree, heads
MANY_TOKENS = 32768  # of 1,024 channels: more than any cache holds
TARGETS = {
    ("forward", "power", 3, 4096, FP32): (Target("plain", at_least=80), Target("compiled", at_least=40)),
    ("forward", "power", 3, MANY_TOKENS, FP32): (Target("sum", at_least=0.7),),
    ("forward", "product", 2, 4096, FP32): (Target("plain", at_least=10), Target("compiled", at_least=10)),
    ("backward", "power", 3, 4096, FP32): (Target("plain", at_least=30),),
    ("backward", "product", 2, 4096, FP32): (Target("plain", at_least=8),),
}
HALF_PRECISION = (Target("float32", at_least=1),)  # half the bytes, so at least as fast

# On a CUDA device.
GPU = {"device": "cuda", "clock": "events"}
REPLAYED = {"device": "cuda", "clock": "graph"}  # calls too short for events
TOKENS = (64, 256, 1024, 4096, 16384, 65536)
# DiT XL/2, expand 2: a frame or an image is 256 tokens.
PRODUCT = {"form": "product", "degree": 2, "width": 2304, "tokens": 256}
POWER = {"form": "power", "degree": 3, "width": 2304, "tokens": 256, "heads": 16}
# The power form as its authors take it: D = 1024, expand 2.
WIDE = {"form": "power", "degree": 3, "width": 2048}
OPS = ("state", "readout", "mix", "causal_mix")
AT_MEMORY_SPEED = {
    **{(op, "forward"): (Target(COPY_BANDWIDTH, at_least=0.85),) for op in ("state", "readout", "mix")},
    **{(op, "backward"): (Target(COPY_BANDWIDTH, at_least=0.80),) for op in ("state", "readout", "mix")},
}  # for 64 MiB of tokens and more
ONE_FRAME = (Target(MICROSECONDS, at_most=6),)
ORDER = (*OPS[:3], "update", "causal_mix")  # what tells most comes first, for a run that is cut short


def host_cases():
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
    for form, degree, heads in MIXES:
        for tokens in (256, 4096):
            yield OpCase("mix", form, degree, tokens, heads=heads, against=(*FORMULA, "copy"))
        yield OpCase("causal_mix", form, degree, 4096, heads=heads, against=("plain", "cumsum", "copy"))


def tokens_in(mebibytes, width, dtype):
    return mebibytes * 2**20 // (width * dtype.itemsize)


def kernel_cases():
    """Every kernel, more than L2 holds and little."""
    for dtype in (BF16, FP16, FP32):
        for op in OPS:
            for passes in ("forward", "backward"):
                large = {**GPU, "dtype": dtype, "passes": passes, "targets": AT_MEMORY_SPEED.get((op, passes), ())}
                small = {**(REPLAYED if passes == "forward" else GPU), "dtype": dtype, "passes": passes}
                for heads in (1,) if op == "state" else (1, 16):
                    for mebibytes in (64, 256) if (dtype, passes) == (BF16, "forward") else (64,):
                        yield OpCase(op, tokens=tokens_in(mebibytes, 2048, dtype), heads=heads, **WIDE, **large)
                    yield OpCase(op, tokens=256, heads=heads, **WIDE, **small)
                yield OpCase(op, batch=64, **PRODUCT, **large)
                for batch in (1, 8):
                    frame = ONE_FRAME if (op, passes, batch) == ("mix", "forward", 1) and dtype != FP32 else ()
                    yield OpCase(op, batch=batch, **PRODUCT, **small, targets=frame)


def update_cases():
    """One frame more in a stream: on the device alone, in a graph, and as a caller waits for it."""
    for shape in (PRODUCT, POWER):
        yield OpCase("update", **shape, dtype=FP16, **REPLAYED, targets=ONE_FRAME)
        for batch in (1, 8):
            targets = ONE_FRAME if batch == 1 else ()
            yield OpCase("update", **shape, batch=batch, dtype=BF16, **REPLAYED, targets=targets)
            for clock in ("events", "latency"):
                yield OpCase("update", **shape, batch=batch, dtype=BF16, device="cuda", clock=clock)


def authors_cases():
    """The authors' op: mean, weighted mean, causal mix."""
    for tokens in TOKENS:
        targets = tuple(Target(name, at_least=5 if tokens >= 4096 else 1) for name in AUTHORS)
        for batch in (1, 4) if tokens >= 4096 else (1,):
            for op, weighted, heads in (("state", False, 1), ("state", True, 1), ("causal_mix", False, 16)):
                for passes in ("forward", "both"):
                    replayed = passes == "forward" and tokens * batch <= 4096
                    more = {"weighted": weighted, "heads": heads, "batch": batch, "passes": passes, "dtype": BF16}
                    how = REPLAYED if replayed else GPU
                    yield OpCase(op, tokens=tokens, **WIDE, **more, **how, against=AUTHORS, targets=targets)


def by_name(cases):
    """{name: case}; cases of the same name become one, with the baselines and targets of both."""
    found = {}
    for case in cases:
        if same := found.get(case.name):
            case = dataclasses.replace(case, against=same.against + case.against, targets=same.targets + case.targets)
        found[case.name] = case
    return found


DEVICE = sorted((*kernel_cases(), *update_cases(), *authors_cases()), key=lambda case: ORDER.index(case.op))
CASES = {"cpu": by_name(host_cases()), "cuda": by_name(DEVICE)}


def main(arguments=None):
    return checked.run("ops", CASES, arguments)
