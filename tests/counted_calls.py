"""Calls whose launches and bytes test_cuda_launches.py holds: `python tests/counted_calls.py` prints {name: row}, JSON.

In a process of its own, for the library that counts must be loaded before pom_ext.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no part of the installed package

import torch

from benchmarks.suites import launches

BF16 = torch.bfloat16
POWER = {"form": "power", "degree": 3, "width": 2048, "dtype": BF16}
PRODUCT = {"form": "product", "degree": 2, "width": 2304, "dtype": BF16}
# 64 MiB of tokens and more.
LONG = POWER | {"tokens": 16384}
FRAMES = PRODUCT | {"tokens": 256, "batch": 64}


def long_calls(case):
    for op in ("state", "readout", "mix", "causal_mix"):
        for passes in ("forward", "backward"):
            yield f"{op} {passes} power", case(op, passes=passes, **LONG)
    for op in ("state", "readout", "mix", "update"):
        yield f"{op} forward product", case(op, **FRAMES)
    yield "state backward product", case("state", passes="backward", **FRAMES)
    for passes in ("forward", "backward"):
        yield f"causal_mix {passes} product", case("causal_mix", passes=passes, **PRODUCT, tokens=8192)
        yield f"causal_mix {passes} power by heads", case("causal_mix", passes=passes, heads=16, **LONG)
    yield "update forward power", case("update", batch=64, **POWER, tokens=256)
    for op in ("readout", "mix"):
        yield f"{op} forward power by heads", case(op, heads=16, **LONG)


def short_calls(case):
    for name, shape in (("power", POWER), ("product", PRODUCT)):
        for tokens in (1, 256, 1000):
            for batch in (1, 3):
                short = shape | {"tokens": tokens, "batch": batch}
                size = f"{name} B{batch} N{tokens}"
                yield f"state forward {size}", case("state", **short)
                yield f"state backward {size}", case("state", passes="backward", **short)
                for heads in (1, 16):
                    yield f"mix forward {size} {heads}", case("mix", heads=heads, **short)
                    yield f"update forward {size} {heads}", case("update", heads=heads, **short)
    yield "state forward weighted", case("state", weighted=True, tokens=1000, **POWER)


def vector_calls(case):
    """Of widths that eight divides, and four, and two."""
    for width in (16, 12, 10):
        for name, shape in (("power", POWER), ("product", PRODUCT)):
            small = shape | {"width": width, "degree": 3, "tokens": 40}
            for op in ("state", "readout", "causal_mix"):
                for passes in ("forward", "backward"):
                    yield f"{op} {passes} {name} E{width}", case(op, passes=passes, **small)
            yield f"mix forward {name} E{width}", case("mix", **small)


def main():
    meter = launches.Meter()

    from benchmarks.harness.layer_case import LayerCase
    from benchmarks.harness.op_case import OpCase
    from pom_ext import State, polynomial_state

    calls = {**dict(long_calls(OpCase)), **dict(short_calls(OpCase)), **dict(vector_calls(OpCase))}
    rows = {name: meter.of_case(case) for name, case in calls.items()}
    # A block of projected tokens holds 4,096 of them.
    for form, degree in (("power", 3), ("product", 2)):
        layer = LayerCase(form, degree, 2048, dim=512, dtype=BF16)
        for what, case in (("forward", layer), ("backward", dataclasses.replace(layer, train=True))):
            rows[f"block {what} {form}"] = meter.of_case(launches.projected(case))
    for form, degree, coeff in (("power", 3, torch.randn(512, 3)), ("product", 2, None)):
        u = torch.randn(2, 1000, 512).to(BF16)
        state = State.empty(2, 512)
        for name, prior in (("alone", {}), ("with a prior", {"state": state})):
            with torch.inference_mode():
                call = partial(polynomial_state, u, coeff, form=form, degree=degree, **prior)
                rows[f"adding {name} {form}"] = meter.of(call).row(None)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
