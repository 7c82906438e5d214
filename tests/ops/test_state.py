"""The state of a context: values and gradients of every mode, splits, and sums that stay accurate."""

from itertools import pairwise

import pytest
import torch
from cases import (
    DTYPES,
    FACTOR_FLOOR,
    FORMS,
    assert_accurate,
    draw_inputs,
    draw_u,
    draw_weights,
    grid,
    move,
    norm_error,
    prior_state,
    reference_state,
    state_dtype,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st

from pom_ext import State, polynomial_state
from pom_ext.ops import reference

ROUNDING = 2e-7  # of float32: two units in the last place


def value(state):
    """What a state holds, in float64."""
    return state.total.double() + state.residual.double()


def draw_leaves(form, degree, batch, tokens, width, device):
    """u and coeff."""
    coeff = torch.rand(width, degree, device=device) if form == "power" else None
    return draw_u(form, degree, (batch, tokens, width * (degree if form == "product" else 1))).to(device), coeff


def assert_same_state(state, other, tolerance=ROUNDING):
    assert norm_error(value(state), value(other).cpu()) <= tolerance
    torch.testing.assert_close(state.count, other.count, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", grid(degrees=(1, 3, 5, 16)), ids=str)
def test_equals_the_definition(case, device):
    """Accumulation is never done in half precision: plain torch, the measure, runs in the dtype of the state."""
    inputs = draw_inputs(case)
    leaves = {name: leaf for name, leaf in inputs.leaves.items() if name != "gate"}
    context, rotary = move((inputs.context, inputs.rotaries.get("rotary")), device)
    counts = []

    def op(u, coeff=None, prior=None):
        state = polynomial_state(
            u,
            coeff,
            form=case.form,
            degree=case.degree,
            rotary=rotary,
            state=prior_state(inputs, prior, device),
            **context,
        )
        assert state.total.dtype == state.residual.dtype == state_dtype(case.dtype)
        assert state.total.shape == state.residual.shape and state.count.shape == state.total.shape[:2]
        counts.append(state.count)
        return {"total": state.total}

    def definition(u, coeff=None, prior=None):
        total, count = reference_state(inputs, u, coeff, prior)
        counts.append(count)
        return {"total": total}

    shape = definition(**move(leaves, "cpu", torch.float64))["total"].shape
    grads = {"total": (1 + torch.randn(shape, dtype=state_dtype(case.dtype))) / max(case.tokens, 1)}
    results = with_gradients(op, move(leaves, device), move(grads, device))
    exact, plain = (
        with_gradients(definition, move(leaves, "cpu", dtype), move(grads, "cpu", dtype))
        for dtype in (torch.float64, state_dtype(case.dtype))
    )
    assert_accurate(results, exact, plain, case)
    assert counts[1].dtype == torch.float64
    torch.testing.assert_close(counts[1].cpu(), counts[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_over_its_whole_range(dtype, device):
    """The state of one token at degree 1 is gelu itself, its gradient the slope."""
    u = torch.linspace(-14, 14, 40_001, dtype=dtype, device=device).view(1, 1, -1).requires_grad_()
    total = polynomial_state(u, form="product", degree=1).total
    (slope,) = torch.autograd.grad(total.sum(), u)
    exact_u = u.detach().double().requires_grad_()
    exact = torch.nn.functional.gelu(exact_u)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_u)
    # A few units in the last place of erf, which is near 1, times u.
    unit = FACTOR_FLOOR[dtype] * (1 + exact_u.abs())
    assert ((total.double() - exact).abs() <= 3 * unit).all()
    assert ((slope.double() - exact_slope).abs() <= 4 * unit + torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("degree", (1, 2, 7, 16))
def test_powers_element_by_element(degree, device):
    u = torch.linspace(-12, 8, 4_001, device=device).view(1, 1, -1)
    coeff = torch.zeros(4_001, degree, device=device)
    coeff[:, -1] = 1
    total = polynomial_state(u, coeff, form="power", degree=degree).total
    exact = reference.features(u.double(), coeff.double(), form="power", degree=degree)
    torch.testing.assert_close(total.double(), exact, rtol=(degree + 2) * 1.2e-7, atol=1e-37)


@given(
    cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.randoms(use_true_random=False), form=st.sampled_from(FORMS)
)
def test_any_split_merged_in_any_order_equals_the_whole(device, cuts, seed, form):
    u, coeff = draw_leaves(form, 3, 2, 40, 5, device)
    weight = draw_weights(2, 40).to(device)
    whole = polynomial_state(u, coeff, form=form, degree=3, weight=weight)
    edges = [0, *sorted(cuts), 40]
    parts = [polynomial_state(u[:, a:b], coeff, form=form, degree=3, weight=weight[:, a:b]) for a, b in pairwise(edges)]
    while len(parts) > 1:
        seed.shuffle(parts)
        parts.append(parts.pop() + parts.pop())
    assert_same_state(parts[0], whole)


@pytest.mark.parametrize("form", FORMS)
def test_a_split_at_every_token_equals_the_whole(form, device):
    """Both ways to put two parts together: adding states, and passing the first to the second."""
    u, coeff = draw_leaves(form, 2, 2, 33, 7, device)
    whole = polynomial_state(u, coeff, form=form, degree=2)
    for cut in range(34):
        first = polynomial_state(u[:, :cut], coeff, form=form, degree=2)
        assert_same_state(first + polynomial_state(u[:, cut:], coeff, form=form, degree=2), whole)
        assert_same_state(polynomial_state(u[:, cut:], coeff, form=form, degree=2, state=first), whole)


@pytest.mark.parametrize("form", FORMS)
def test_groups_are_the_states_of_their_parts(form, device):
    """Frames hold all up to their end, packed sequences their own tokens, causal groups every prefix."""
    u, coeff = draw_leaves(form, 2, 3, 11, 7, device)
    weight, edges = draw_weights(3, 11).to(device), [0, 4, 4, 5, 11]

    def state(tokens, **context):
        return polynomial_state(u[:, tokens], coeff, form=form, degree=2, weight=weight[:, tokens], **context)

    frames = state(slice(None), frames=edges)
    packed = state(slice(None), cu_seqlens=edges)
    causal = state(slice(None), causal=True)
    assert frames.total.shape[1] == packed.total.shape[1] == 4 and causal.total.shape[1] == 11
    for group, (start, end) in enumerate(pairwise(edges)):
        assert_same_state(pick(frames, group), state(slice(0, end)))
        assert_same_state(pick(packed, group), state(slice(start, end)))
    for token in range(11):
        assert_same_state(pick(causal, token), state(slice(0, token + 1)))
    assert_same_state(frames.last(), state(slice(None)))


def pick(state, group):
    """One group of a state."""
    return State(*(field[:, group : group + 1] for field in (state.total, state.residual, state.count)))


@pytest.mark.parametrize("groups, tokens", [(70, 700), (600, 66)])
@pytest.mark.parametrize("form", FORMS)
def test_a_dense_mask_is_a_product_of_matrices(form, groups, tokens, device):
    """Of more groups, tokens and channels than a kernel takes at once, with a group that sees nothing."""
    u, coeff = draw_leaves(form, 2, 2, tokens, 34, device)
    mask, grad = draw_weights(2, groups, tokens).to(device), torch.randn(2, groups, u.shape[-1])
    mask[:, 5] = 0
    state = polynomial_state(u.requires_grad_(), coeff, form=form, degree=2, mask=mask)
    (slope,) = torch.autograd.grad(state.total, u, grad.to(device))
    wide, weights = u.detach().double().cpu().requires_grad_(), mask.double().cpu()
    of_coeff = None if coeff is None else coeff.double().cpu()
    total = weights @ reference.features(wide, of_coeff, form=form, degree=2)
    (exact,) = torch.autograd.grad(total, wide, grad.double())
    assert norm_error(value(state), total) <= 1e-6 and norm_error(slope, exact) <= 1e-6
    torch.testing.assert_close(state.count.cpu(), weights.sum(2), rtol=1e-12, atol=0)
    assert not state.total[:, 5].any() and not state.residual[:, 5].any() and not state.count[:, 5].any()


def test_infinite_features_under_a_dense_mask(device):
    """They reach their own channel alone, and where nothing is seen the mean is zero even so."""
    u, mask = torch.randn(1, 70, 40, device=device), torch.ones(1, 70, 70, device=device)
    u[0, 66, 33], mask[0, 3] = float("inf"), 0
    state = polynomial_state(u, form="product", degree=1, mask=mask)
    finite = state.total.isfinite()
    assert not finite[0, :, 33].any() and finite.sum() == 70 * 39
    assert state.total[0, 4, 33] == float("inf") and state.residual[0, 4, 33] == 0
    assert not state.mean()[0, 3].any()


@pytest.mark.parametrize("form", FORMS)
def test_one_frame_length_and_manual_chunks(form, device):
    u, coeff = draw_leaves(form, 2, 2, 12, 7, device)
    frames = polynomial_state(u, coeff, form=form, degree=2, frames=3)
    state = State.empty(2, u.shape[-1], device=device)
    for frame in range(4):
        state = state + polynomial_state(u[:, 3 * frame : 3 * frame + 3], coeff, form=form, degree=2)
        assert_same_state(pick(frames, frame), state)


def test_a_state_seen_by_every_group(device):
    u, coeff = draw_leaves("power", 2, 2, 12, 7, device)
    before = polynomial_state(u[:, :5], coeff, form="power", degree=2)
    for context in ({"frames": [0, 3, 3, 7]}, {"causal": True}, {}):
        alone = polynomial_state(u[:, 5:], coeff, form="power", degree=2, **context)
        after = polynomial_state(u[:, 5:], coeff, form="power", degree=2, state=before, **context)
        assert_same_state(after, before + alone)


def test_a_long_stream_stays_accurate(device):
    """10,000 frames one after the other, each added to the state by the operation."""
    u = torch.full((1, 1, 1), 0.1, device=device)
    coeff = torch.full((1, 1), 1.7, device=device)
    naive, step = torch.zeros(1, 1, 1), polynomial_state(u, coeff, form="power", degree=1).total.cpu()
    state = State.empty(1, 1, device=device)
    for _ in range(10_000):
        state = polynomial_state(u, coeff, form="power", degree=1, state=state)
        naive += step
    assert abs(naive.item() / (10_000 * step.item()) - 1) > 1e-6  # the stream is long enough to tell
    assert abs(state.mean().item() / step.item() - 1) < 1e-7
    assert state.count.item() == 10_000


def test_one_long_sequence_stays_accurate(device):
    u = torch.full((1, 1_000_000, 1), 0.1, device=device)
    coeff = torch.full((1, 1), 1.7, device=device)
    one = polynomial_state(u[:, :1], coeff, form="power", degree=1)
    state = polynomial_state(u, coeff, form="power", degree=1)
    assert (value(state) / (1_000_000 * value(one)) - 1).abs().item() < 1e-6
    assert state.count.item() == 1_000_000
