"""Calls drawn at random, each held against the definition in float64; and every call that once failed, by name.

`make fuzz` draws tens of thousands. To repeat a run, give its seed: make fuzz SEED=...
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FORMS, FREE, HALF, MODES, Case, norm_error
from fuzzing import ENTRIES, Call, Layer
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from layouts import LAYOUTS

from pom_ext.layers.grouped_linear import GroupedLinear

CASES = int(os.environ.get("POM_EXT_FUZZ_CASES", "300"))
SEED = int(os.environ.get("POM_EXT_FUZZ_SEED", "0"))

PART = 1_000  # calls of one test: hypothesis remembers all of them
FEW = 16  # numbers among which one that happens to cancel weighs too much: sums of so few are of positive numbers
PIECES = ("merged", "continued", "update")  # entries that cut the tokens in two
STRIDED = [name for name in LAYOUTS if not name.startswith("one ")]
WITH_NAN = ("sliced", "every other", "sliced by four")
ONE_DIMENSION = (*WITH_NAN, "unaligned", "aligned to four")
COEFFICIENTS = (None, torch.float32, *HALF)
WEIGHTS = (None, torch.bool, torch.uint8, torch.int64, *HALF)


def sizes(least, *edges):
    """Small ones, and those about which a kernel begins another block."""
    return st.integers(least, 20) | st.sampled_from([edge + step for edge in edges for step in (-1, 0, 1)])


def subset(draw, names):
    which = draw(st.sampled_from(("none", "all", "some")))
    return tuple(name for name in names if which == "all" or (which == "some" and draw(st.booleans())))


def divisors(number, most=40):
    return st.sampled_from([n for n in range(1, min(number, most) + 1) if number % n == 0])


def draw_case(draw, entry, widths, lengths, largest):
    """Of at most so many features, and without rotary positions."""
    form, degree, dtype = draw(st.sampled_from(FORMS)), draw(st.integers(1, 16)), draw(st.sampled_from(DTYPES))
    # An update has one group alone; pieces one after the other need groups of all tokens so far.
    modes = {
        "update": ("whole", "weight"),
        "continued": [mode for mode in MODES if mode.startswith(("causal", "frames"))],
    }
    mode = draw(st.sampled_from(modes.get(entry, MODES)))
    batch, width = draw(st.sampled_from((1, 2, 3, 5, 0))), draw(widths)
    channels = width * degree if form == "product" else width
    tokens = min(draw(lengths), largest // (max(batch, 1) * channels))
    queries = draw(st.none() | sizes(0, 64)) if mode in FREE else None
    heads = draw(divisors(channels))
    prior = mode.split("+")[0] not in ("mask", "cu_seqlens") and draw(st.booleans())
    return Case(form, degree, mode, dtype, batch, tokens, width, queries, heads, prior=prior)


def draw_axes(draw, case):
    """Rotary axes of the features, and as they must with `causal` and in the layer, of the gates."""
    gates = case.width if case.heads == 1 else case.heads
    return draw(st.sampled_from([axes for axes in range(4) if case.form == "power" or axes == 0 if 2 * axes <= gates]))


def draw_groups(draw, case, entry):
    """Offsets and a place to cut."""
    tokens, kind, offsets = case.tokens, case.mode.partition("+")[0], None
    if kind == "frames":
        offsets = draw(divisors(tokens) if tokens else st.just(1))
    elif kind in ("frames_unequal", "cu_seqlens"):
        offsets = (0, *sorted(draw(st.lists(st.integers(0, tokens), max_size=6))), *[tokens] * (tokens > 0))
    if entry == "continued" and kind != "causal":  # a frame is not cut
        ends = range(0, tokens + 1, offsets) if kind == "frames" else offsets
        return {"offsets": offsets, "cut": draw(st.sampled_from(ends))}
    return {"offsets": offsets, "cut": draw(st.integers(0, tokens)) if entry in PIECES else 0}


def draw_rest(draw, call, layouts):
    """Dtypes, strides and derivatives of a call."""
    case = call.case
    rotary = [name for name in ("rotary", "gate_rotary") if case.axes and not isinstance(call, Layer)]
    tensors = [*call.leaves, *(f"grad of {name}" for name in call.outputs), *["residual"] * case.prior]
    weights = [name for name in ("weight", "mask") if name in case.mode]
    call = replace(call, seed=draw(st.integers(0, 2**31)), weights=draw(st.sampled_from(WEIGHTS)) if weights else None)
    laid_out = {}
    for name in subset(draw, tensors + weights + rotary):
        possible = STRIDED if name in rotary else ONE_DIMENSION if name.endswith("bias") else layouts
        if name == "coeff":  # smaller for the higher powers, or float16 does not hold these
            possible = [each for each in possible if each not in ("one channel", "one value")]
        whole_numbers = name in weights and call.weights in (torch.bool, torch.uint8, torch.int64)
        laid_out[name] = draw(st.sampled_from([each for each in possible if not (whole_numbers and each in WITH_NAN)]))
    differentiable = [] if call.entry == "update" else call.leaves
    return replace(
        call,
        layouts=tuple(laid_out.items()),
        wanted=subset(draw, differentiable),
        received=subset(draw, call.outputs),
        # torch takes no tangent of an expanded tensor
        moved=subset(draw, [name for name in differentiable if not laid_out.get(name, "").startswith("one ")]),
    )


@st.composite
def calls(draw):
    entry = draw(st.sampled_from(list(ENTRIES)))
    case = draw_case(draw, entry, sizes(1, 32, 128), sizes(0, 32, 64, 128, 192), 20_000)
    gates = case.batch * (case.tokens if case.queries is None else case.queries) * case.heads
    signed = case.width >= FEW and (case.heads == 1 or gates >= FEW or gates == 0) and draw(st.booleans())
    if signed:
        case = replace(case, axes=draw_axes(draw, case))
    coeff = draw(st.sampled_from(COEFFICIENTS)) if case.form == "power" else None
    call = Call(case, entry, signed=signed, coeff=coeff, **draw_groups(draw, case, entry))
    return draw_rest(draw, call, STRIDED if signed else list(LAYOUTS))


@st.composite
def layers(draw):
    dim = draw(st.sampled_from((16, 17, 24, 36)))
    case = draw_case(draw, "mix", st.sampled_from((dim, 2 * dim)), sizes(0, 64, 256, 1024), 40_000)
    many = case.heads == 1 or case.heads >= FEW  # biases of the gates
    if many:
        case = replace(case, axes=draw_axes(draw, case))
    options = {
        "dim": dim,
        "n_groups": draw(divisors(dim)),
        "bias": draw(st.sampled_from((None, False, True))),
        "memory": draw(st.sampled_from(("store", "recompute"))),
    }
    # In half precision the projections lose most of what a state loses, as for plain torch. If few large numbers make
    # the state, a later loss of plain torch may happen to cancel it.
    signed = many and case.dtype not in HALF and draw(st.booleans())
    call = Layer(case, signed=signed, **options, **draw_groups(draw, case, "mix"))
    return draw_rest(draw, call, STRIDED)


@pytest.mark.parametrize("part", range(0, CASES, PART))
def test_calls_drawn_at_random(part, device):
    @settings(max_examples=min(PART, CASES - part))
    @seed(SEED + part)
    @given(call=calls() | calls() | calls() | layers())
    def check(call):
        call.check(device)

    check()


# What drawn calls have found.
FOUND = {
    "the state after no frames has one group": Call(Case("product", 1, "frames", batch=1, tokens=0), offsets=1),
    "the state after no frames can be continued": Call(
        Case("power", 1, "frames_unequal", batch=1, tokens=0, prior=True), "continued", offsets=(0,)
    ),
    "rotary positions and heads of one channel": Layer(
        Case("power", 2, batch=1, width=16, heads=16, axes=1), signed=True, dim=16
    ),
    "a strided bias": Layer(
        Case("product", 4, "whole", batch=1, tokens=1, width=16), dim=16, layouts=(("gate_proj.bias", "every other"),)
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name, device):
    FOUND[name].check(device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_grouped_projection_is_rounded_once(dtype, device):
    """As nn.Linear is: not before the bias is added and again after it."""
    x, grouped = torch.randn(2, 50, 36).to(dtype), GroupedLinear(36, 360, 2).to(dtype)
    torch.nn.init.uniform_(grouped.bias, -0.5, 0.5)
    weight, bias = torch.block_diag(*grouped.weight), grouped.bias
    exact = F.linear(x.double(), weight.double(), bias.double()).detach()
    plain = norm_error(F.linear(x, weight, bias).detach(), exact)
    assert norm_error(grouped.to(device)(x.to(device)).detach(), exact) < 1.05 * plain
