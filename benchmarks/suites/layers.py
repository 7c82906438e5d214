"""The cases on a CUDA device: all by name, with their baselines and their targets."""

import dataclasses

import torch

from .layers import AUTHORS, LayerCase
from .measure import COPY_BANDWIDTH, MICROSECONDS, Target
from .ops import OpCase

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
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


def layer_cases():
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


def by_name(cases):
    """A case that stands there twice is measured once, with the baselines and targets of both."""
    found = {}
    for case in cases:
        if same := found.get(case.name):
            case = dataclasses.replace(case, against=same.against + case.against, targets=same.targets + case.targets)
        found[case.name] = case
    return found


def rank(case):
    """The operations before the layers, which are made of them: a run that is cut short has what tells most."""
    order = (*OPS[:3], "update", "causal_mix")
    return order.index(case.op) if isinstance(case, OpCase) else len(order)


CASES = by_name(sorted((*kernel_cases(), *update_cases(), *authors_cases(), *layer_cases()), key=rank))
