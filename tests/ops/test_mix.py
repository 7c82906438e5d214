"""The fused operation: values and gradients of every mode, and what it does with special values and empty inputs."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import (
    DEGREES,
    FORMS,
    HALF,
    MODES,
    Case,
    check,
    draw_inputs,
    grid,
    move,
    norm_error,
    op_function,
    prior_state,
    run_op,
    run_reference,
)

from pom_ext import State, polynomial_mix, polynomial_readout, polynomial_state
from pom_ext.ops import reference

F32, F64 = torch.float32, torch.float64
LARGE = [
    Case("product", 2, "whole", F32, batch=2, tokens=1031, width=100),
    Case("product", 4, "causal", torch.bfloat16, batch=2, tokens=1031, width=100, heads=10),
    Case("power", 3, "causal+weight", torch.float16, batch=2, tokens=1031, width=100, heads=4, axes=2),
    # Of more tiles than a block adds up by itself.
    Case("power", 3, "causal", torch.bfloat16, batch=1, tokens=2500, width=96, heads=4, prior=True),
    Case("product", 2, "causal+weight", F32, batch=1, tokens=2500, width=12),
    Case("power", 2, "causal", F64, batch=2, tokens=1100, width=5, axes=1),
    Case("power", 16, "frames_unequal", F32, batch=2, tokens=1031, width=100),
    Case("power", 3, "whole", F32, batch=1, tokens=20_000, width=33, queries=5),
    Case("product", 2, "weight", torch.bfloat16, batch=1, tokens=20_000, width=9, queries=5),
]
# Sizes that four divides and eight does not: of a row of channels, of a head, and of the pairs that turn.
FOURS = [
    Case(form, degree, mode, dtype, batch=2, tokens=35, width=width, heads=heads, axes=axes)
    for form, width, heads, axes in (
        *((form, *sizes, 0) for form in FORMS for sizes in ((4, 1), (36, 3), (100, 1), (260, 1))),
        ("power", 40, 1, 1),
    )
    for degree in (2, 3, 4)
    for mode in ("whole", "mask", "causal")
    for dtype in HALF
]


@pytest.mark.parametrize("case", grid() + LARGE + FOURS, ids=str)
def test_equals_the_definition(case, device):
    check(draw_inputs(case), device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form, mode", list(product(FORMS, ("whole", "frames_unequal+weight", "causal", "mask"))))
def test_half_precision_costs_one_rounding(form, mode, dtype, device):
    """Half inputs give what the same numbers in float32 give, rounded once: everything between is float32."""
    inputs = draw_inputs(Case(form, 3, mode, dtype, tokens=129, width=33))
    inputs.output_grads["state"].zero_()  # gradients of two outputs may each be rounded
    wide = replace(inputs, leaves=move(inputs.leaves, dtype=F32), output_grads=move(inputs.output_grads, dtype=F32))
    for (name, half), single in zip(run_op(inputs, device).items(), run_op(wide, device).values(), strict=True):
        if half.dtype in HALF:
            assert (half != single.to(half.dtype)).double().mean() < 0.01, name
        else:
            assert norm_error(half, single.cpu().double()) < 1e-6, name


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_slopes_at_the_kinks_are_those_of_torch(dtype, device):
    u = torch.tensor([0.0, -0.0, 6.0, 6.5, -12.0, 1e-30, -1e-30, 1.0], dtype=dtype)[None, None]
    gate = torch.tensor([-3.0, 3.0, 0.0, -3.5, 3.5, 2.999, -2.999, 1.0], dtype=dtype)[None, None]
    coeff = torch.ones(8, 2, dtype=dtype)
    case = Case("power", 2, "whole", dtype, batch=1, tokens=1, width=8)
    inputs = replace(draw_inputs(case), leaves={"u": u, "gate": gate, "coeff": coeff})
    results, exact = run_op(inputs, device), run_reference(inputs, F64)
    for name in ("grad u", "grad gate"):
        torch.testing.assert_close(results[name].cpu().double(), exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "form, degree, heads", [("product", 2, 1), ("product", 2, 3), ("power", 3, 3), ("power", 2, 1)]
)
def test_gradcheck(form, degree, heads, mode, device):
    prior = mode.split("+")[0] not in ("mask", "cu_seqlens")
    axes = 1 if form == "power" else 0
    inputs = draw_inputs(Case(form, degree, mode, F64, batch=2, tokens=4, width=3, heads=heads, axes=axes, prior=prior))
    leaves = {name: leaf.to(device).requires_grad_() for name, leaf in inputs.leaves.items()}
    mix = op_function(inputs, device)
    assert torch.autograd.gradcheck(
        lambda *values: tuple(mix(**dict(zip(leaves, values, strict=True))).values()), tuple(leaves.values())
    )


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_asked_for(form, device):
    """Any choice of inputs that require grad gives the gradients that all of them together give."""
    inputs = draw_inputs(Case(form, 3, "frames_unequal", width=5, prior=True))
    everything = run_op(inputs, device)
    for wanted in inputs.leaves:
        fixed = {name: leaf.to(device) for name, leaf in inputs.leaves.items() if name != wanted}
        mix, leaf = op_function(inputs, device), inputs.leaves[wanted].to(device).requires_grad_()
        outputs, grads = mix(**{wanted: leaf}, **fixed), move(inputs.output_grads, device)
        differentiable = ["y"] if wanted == "gate" else ["y", "state"]
        (grad,) = torch.autograd.grad([outputs[n] for n in differentiable], leaf, [grads[n] for n in differentiable])
        torch.testing.assert_close(grad, everything[f"grad {wanted}"])


@pytest.mark.parametrize("mode", ("weight", "mask", "causal+weight"))
@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float16, F64), ids=str)
def test_weights_of_any_dtype(dtype, mode, device):
    inputs = draw_inputs(Case("power", 2, mode))
    name = mode.split("+")[-1]
    for high in (2, 5)[: 1 if dtype == torch.bool else 2]:
        weights = torch.randint(high, inputs.context[name].shape)
        given = replace(inputs, context=inputs.context | {name: weights.to(dtype)})
        expected = replace(inputs, context=inputs.context | {name: weights.to(F32)})
        torch.testing.assert_close(run_op(given, device), run_op(expected, device), rtol=0, atol=0)


def test_offsets_of_any_kind(device):
    inputs = draw_inputs(Case("power", 2, "frames", tokens=6))
    expected = run_op(replace(inputs, context={"frames": [0, 2, 4, 6]}), device)
    tensors = [torch.tensor([0, 2, 4, 6], dtype=dtype) for dtype in (torch.int32, torch.int64)]
    for frames in (2, (0, 2, 4, 6), *tensors):
        torch.testing.assert_close(
            run_op(replace(inputs, context={"frames": frames}), device), expected, rtol=0, atol=0
        )


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=str)
def test_coefficients_keep_their_own_dtype(dtype, device):
    """Parameters in float32 beside half inputs, as under autocast, and the reverse."""
    other = torch.bfloat16 if dtype == F32 else F32
    u, gate = torch.randn(2, 2, 7, 5, device=device).to(dtype).unbind()
    coeff = torch.randn(5, 3, device=device).to(other).requires_grad_()
    y = polynomial_mix(u, gate, coeff, form="power", degree=3)
    y.sum().backward()
    wide = coeff.detach().double().requires_grad_()
    exact = reference.mix(u.cpu().double(), gate.cpu().double(), wide.cpu(), form="power", degree=3)
    exact.sum().backward()
    assert y.dtype == dtype and coeff.grad.dtype == other
    torch.testing.assert_close(y.cpu().double(), exact, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(coeff.grad.double(), wide.grad, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("mode", ("weight", "mask", "cu_seqlens+weight"))
@pytest.mark.parametrize("form", FORMS)
def test_a_context_of_no_weight_reads_zero(form, mode, device):
    inputs = draw_inputs(Case(form, 3, mode))
    inputs.context["mask" if mode == "mask" else "weight"][:] = 0
    results = run_op(inputs, device)
    torch.testing.assert_close(results, {name: torch.zeros_like(result) for name, result in results.items()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ("whole", "weight", "mask"))
def test_no_context_tokens(form, mode, device):
    results = run_op(draw_inputs(Case(form, 2, mode, tokens=0, queries=4)), device)
    assert results["y"].shape[1] == 4 and results["grad u"].shape[1] == 0
    torch.testing.assert_close(results, {name: torch.zeros_like(result) for name, result in results.items()})


@pytest.mark.parametrize("form", FORMS)
def test_no_context_tokens_after_a_state(form, device):
    check(draw_inputs(Case(form, 3, "whole", tokens=0, queries=4, prior=True)), device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ("causal", "cu_seqlens", "frames_unequal"))
def test_no_tokens_at_all(form, mode, device):
    """An empty sequence leaves the state as it was."""
    inputs = draw_inputs(Case(form, 2, mode, tokens=0, prior=mode != "cu_seqlens"))
    results = run_op(inputs, device)
    assert results["y"].shape == (2, 0, inputs.case.channels)
    if "state" in results:
        torch.testing.assert_close(results["state"].cpu(), inputs.leaves["prior"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_no_batch(form, mode, device):
    results = run_op(draw_inputs(Case(form, 2, mode, batch=0, width=5)), device)
    assert results["y"].shape == results["grad u"].shape == (0, 7, 10 if form == "product" else 5)
    if form == "power":
        assert results["grad coeff"].abs().max() == 0


@pytest.mark.parametrize("mode", ("whole", "weight", "mask"))
@pytest.mark.parametrize("form", FORMS)
def test_no_queries(form, mode, device):
    inputs = draw_inputs(Case(form, 2, mode, queries=0))
    results = run_op(inputs, device)
    assert results["y"].shape == (2, 0, inputs.case.channels)
    if mode == "mask":
        assert not results["grad u"].any()
    else:  # the state is returned all the same
        exact = run_reference(inputs, F64)
        torch.testing.assert_close(results["grad u"].cpu().double(), exact["grad u"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ("whole", "frames_unequal", "causal", "cu_seqlens"))
@pytest.mark.parametrize("form", FORMS)
def test_nan_reaches_only_what_sees_it(form, mode, device):
    width, degree, tokens = 6, 3, 9
    inputs = draw_inputs(Case(form, degree, mode, tokens=tokens, width=width))
    token, channel = 4, 1 + (width if form == "product" else 0)  # of the second factor
    inputs.leaves["u"][0, token, channel] = float("nan")
    y = run_op(inputs, device)["y"].cpu()
    frames = inputs.context.get("frames", inputs.context.get("cu_seqlens"))
    seen = reference.context_weights(2, tokens, like=y, **inputs.context)[0, :, token] > 0  # (G,)
    queries = seen.repeat_interleave(torch.as_tensor(frames).diff()) if frames is not None else seen.expand(tokens)
    channels = torch.zeros(inputs.case.channels, dtype=torch.bool)
    channels[channel::width] = True  # the products from the second on
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0] = queries[:, None] & channels
    assert torch.equal(y.isnan(), expected) and y[~expected].isfinite().all()


@pytest.mark.parametrize("weight", (float("nan"), float("inf"), 1e30))
def test_a_weight_changes_no_earlier_token(weight, device):
    inputs = draw_inputs(Case("power", 2, "causal+weight", batch=1, tokens=300))
    before = run_op(inputs, device)["y"]
    for token in (5, 21, 290):
        weights = inputs.context["weight"].clone()
        weights[0, token] = weight
        y = run_op(replace(inputs, context=inputs.context | {"weight": weights}), device)["y"]
        assert torch.equal(y[:, :token], before[:, :token]) and not torch.equal(y[:, token:], before[:, token:])


@pytest.mark.parametrize("heads", (1, 3))
@pytest.mark.parametrize("form", FORMS)
def test_nan_gate(form, heads, device):
    inputs = draw_inputs(Case(form, 1, "whole", width=6, heads=heads))
    inputs.leaves["gate"][1, 2, 1] = float("nan")
    y = run_op(inputs, device)["y"].cpu()
    per_gate = 6 // heads if heads > 1 else 1
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 2, per_gate : 2 * per_gate] = True
    assert torch.equal(y.isnan(), expected)


def test_infinite_inputs(device):
    """The power form is bounded; the product form passes infinity on, in its own channel alone."""
    inputs = draw_inputs(Case("power", 3, "whole"))
    inputs.leaves["u"][0, 2, 4], inputs.leaves["u"][0, 3, 5] = float("inf"), -float("inf")
    bounded = replace(inputs, leaves=inputs.leaves | {"u": inputs.leaves["u"].clamp(-10, 6)})
    torch.testing.assert_close(run_op(inputs, device)["y"], run_op(bounded, device)["y"])

    inputs = draw_inputs(Case("product", 2, "whole", width=5))
    inputs.leaves["u"][0, 2, 5] = float("inf")  # of the second factor
    finite = run_op(inputs, device)["y"].isfinite()
    assert not finite[0, :, 5].any() and finite.sum() == finite.numel() - 7


@pytest.mark.parametrize("axes", (1, 2, 3))
@pytest.mark.parametrize("mode", ("whole", "frames_unequal"))
@pytest.mark.parametrize("which", ("rotary", "gate_rotary"))
def test_one_rotary_alone(which, mode, axes, device):
    inputs = draw_inputs(Case("power", 2, mode, axes=axes, width=20))
    check(replace(inputs, rotaries={which: inputs.rotaries[which]}), device)


def test_rotary_rows_differ_for_queries(device):
    """With M != N the features have N rows of angles, the gates M."""
    check(draw_inputs(Case("power", 3, "whole", queries=4, axes=2, width=20)), device)


@pytest.mark.parametrize("prior", (False, True))
@pytest.mark.parametrize("mode", ("whole", "weight"))
@pytest.mark.parametrize("form", FORMS)
def test_one_call_is_state_and_readout(form, mode, prior, device):
    inputs = draw_inputs(Case(form, 3, mode, tokens=130, width=33, queries=9, axes=int(form == "power"), prior=prior))
    leaves, context, rotaries = move((inputs.leaves, inputs.context, inputs.rotaries), device)
    before = prior_state(inputs, leaves.pop("prior", None), device)
    gate, options = leaves.pop("gate"), {"form": form, "degree": 3, "state": before}
    y, mixed = polynomial_mix(**leaves, gate=gate, **options, **context, **rotaries, return_state=True)
    state = polynomial_state(**leaves, **options, **context, rotary=rotaries.get("rotary"))
    torch.testing.assert_close(mixed.total, state.total, rtol=1e-5, atol=1e-4)  # of 130 numbers in another order
    torch.testing.assert_close(mixed.count, state.count)
    alone = polynomial_readout(gate, state, form=form, rotary=rotaries.get("gate_rotary"))
    torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", (1, 1500))
def test_nothing_of_a_large_prior_state_is_lost(queries, device):
    """Sums of which a float32 holds either end but not both, in the total and in what it cannot hold."""
    one = torch.ones(1, 1, 8, device=device)
    state = State(one * 2**30, one * 2**-10, torch.ones(1, 1, dtype=torch.float64, device=device))
    options = {"form": "power", "degree": 1, "return_state": True}
    coeff, gate = torch.full((8, 1), 2.0**-12, device=device), one.expand(1, queries, 8)
    for _ in range(8):
        _, state = polynomial_mix(one.expand(1, 2, 8), gate, coeff, state=state, **options)
    assert (state.total.double() + state.residual.double() == 2**30 + 2**-10 + 8 * 2 * 2**-12).all()
    assert state.count.item() == 17


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"frames": 7}), ids=str)
@pytest.mark.parametrize("where", ("u", "prior"))
def test_an_infinite_sum_after_a_state(where, options, device):
    """It stays infinite, with no rest, whichever way it came in."""
    u, gate = torch.randn(2, 1, 7, 12, device=device).unbind()
    state = State.empty(1, 12, device=device)
    (u if where == "u" else state.total)[0, 0, 3] = float("inf")
    _, state = polynomial_mix(u, gate, form="product", degree=1, state=state, return_state=True, **options)
    assert state.total[0, 0, 3] == float("inf") and state.residual[0, 0, 3] == 0
    assert state.total.isinf().sum() == 1 and not state.residual.isnan().any()


def test_returned_state_continues(device):
    """Mixing the second half after the state of the first equals mixing both at once."""
    u, gate = torch.randn(2, 2, 12, 6, device=device).unbind()
    for options in ({"causal": True}, {"frames": 3}, {"frames": 3, "weight": torch.rand(2, 12, device=device)}):
        parts, state = [], None
        for half in (slice(0, 6), slice(6, 12)):
            cut = {key: value[:, half] if key == "weight" else value for key, value in options.items()}
            y, state = polynomial_mix(
                u[:, half], gate[:, half], form="product", degree=2, state=state, return_state=True, **cut
            )
            parts.append(y)
        whole, last = polynomial_mix(u, gate, form="product", degree=2, return_state=True, **options)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)
        assert isinstance(state, State) and torch.equal(state.count, last.count)
        torch.testing.assert_close(state.total, last.total, rtol=1e-6, atol=1e-6)


def test_degrees_of_one_are_the_activation(device):
    """The first product is the first factor alone, whatever the degree: degrees share their prefix."""
    u, gate = torch.randn(2, 1, 7, 48, device=device).unbind()
    first = polynomial_mix(u[..., :3], gate[..., :3], form="product", degree=1)
    for degree in DEGREES[1:]:
        y = polynomial_mix(u[..., : 3 * degree], gate[..., : 3 * degree], form="product", degree=degree)
        torch.testing.assert_close(y[..., :3], first, rtol=1e-6, atol=1e-7)
