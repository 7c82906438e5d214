"""A state from before, inside the operation that adds tokens to it: values as if merged, and every derivative of it."""

from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, FORMS, Launches, draw_prior, draw_weights, state_dtype
from test_state import draw_leaves, value

from pom_ext import PoM, State, polynomial_state
from pom_ext.ops.projected import projected_state

TOKENS, DIM = 70, 16


def assert_as_if_merged(found, merged, *parts):
    """The same sums, and totals that round differently only where the sum lies in the middle of two numbers."""
    exact, eps = sum(map(value, parts)), torch.finfo(found.total.dtype).eps
    assert (value(found) - exact).abs().max() <= 1e-14 * exact.abs().max()
    torch.testing.assert_close(found.total, merged.total, rtol=eps, atol=8 * 2.0**-52 * exact.abs().max().item())
    assert (found.residual.abs() <= eps * found.total.abs()).all()
    torch.testing.assert_close(found.count, merged.count, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "context", ({}, {"weight": True}, {"frames": 5}, {"frames": [0, 0, 3, 3, 70]}, {"causal": True}), ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_a_state_from_before_is_as_if_merged(form, context, dtype, device):
    """To what the residual rounds: far below the last place of the total."""
    u, coeff = (None if t is None else t.to(dtype) for t in draw_leaves(form, 3, 2, 70, 9, device))
    wide = state_dtype(dtype)
    context = context | ({"weight": draw_weights(2, 70).to(device)} if "weight" in context else {})
    total, _, count = (t.to(device) for t in draw_prior(2, u.shape[2], dtype))
    before = State(total, torch.randn_like(total) * torch.finfo(wide).eps * 100, count)
    alone = polynomial_state(u, coeff, form=form, degree=3, **context)
    found = polynomial_state(u, coeff, form=form, degree=3, state=before, **context)
    merged = before + alone
    assert (found.total.dtype, found.total.shape) == (wide, merged.total.shape) and found.total.is_contiguous()
    assert_as_if_merged(found, merged, before, alone)


@pytest.mark.parametrize("context", ({}, {"frames": 2}, {"causal": True}), ids=str)
def test_a_state_from_before_that_is_no_number(context, device):
    """Infinities and NaN come through as `+` has them, and stay in their channels."""
    inf, nan, huge = float("inf"), float("nan"), 3e38
    total = torch.tensor([inf, -inf, nan, inf, huge, 1.0], device=device).expand(1, 1, 6)
    u = torch.tensor([1.0, 1.0, 1.0, -inf, huge, nan], device=device).expand(1, 4, 6)
    coeff = torch.ones(6, 1, device=device)
    coeff[3] = inf  # times the lower bound of the clamp
    coeff[4] = 1e38
    before = State(total, torch.zeros_like(total), torch.ones(1, 1, dtype=torch.float64, device=device))
    merged = before + polynomial_state(u, coeff, form="power", degree=1, **context)
    found = polynomial_state(u, coeff, form="power", degree=1, state=before, **context)
    for field in ("total", "residual"):
        torch.testing.assert_close(getattr(found, field), getattr(merged, field), equal_nan=True)
    assert found.total[0, 0].isnan().tolist() == [False, False, True, True, False, True]
    assert found.total[0, -1, 4].isinf()


def test_adding_to_a_state_is_no_operation_of_its_own(device):
    u, coeff = draw_leaves("power", 2, 2, 12, 7, device)
    before = polynomial_state(u, coeff, form="power", degree=2)
    for context in ({}, {"weight": torch.rand(2, 12, device=device)}):
        with Launches() as alone:
            polynomial_state(u, coeff, form="power", degree=2, **context)
        with Launches() as added:
            polynomial_state(u, coeff, form="power", degree=2, state=before, **context)
        assert added.names == alone.names and added.names.count("state") == 1


def test_gradients_of_a_state_from_before(device):
    """They need neither its values nor a pass over tokens; a count that requires grad gets one too."""
    u, coeff = draw_leaves("power", 2, 2, 12, 7, device)
    before = State(*(t.requires_grad_() for t in State.empty(2, 7, device=device).state_dict().values()))
    state = polynomial_state(u, coeff, form="power", degree=2, frames=4, state=before)
    assert state.total.shape[1] == 3 and state.count.requires_grad
    weights = torch.rand_like(state.total)
    with Launches() as called:
        grads = torch.autograd.grad(
            (weights * state.total).sum() + state.count.sum(), before.state_dict().values(), retain_graph=True
        )
    assert "state_backward" not in called.names
    expected = weights.sum(1, keepdim=True)
    torch.testing.assert_close(grads, (expected, expected, torch.full_like(before.count, 3)))

    before = State(before.total, before.residual.detach(), before.count.detach())
    state = polynomial_state(u, coeff, form="power", degree=2, state=before)
    assert not state.count.requires_grad
    with torch.no_grad():
        before.total.add_(1)
    (grad,) = torch.autograd.grad(state.total.sum(), before.total)
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("context", ({}, {"frames": 2}), ids=str)
def test_derivatives_of_a_state_from_before(context, device):
    """First and second, forward and backward, of total, residual and count; and in batches, some of which share it."""
    double = lambda *shape: torch.rand(*shape, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [double(2, 4, 3), double(3, 2), double(2, 1, 3), double(2, 1, 3), double(2, 1)]

    def function(u, coeff, *before):
        state = polynomial_state(u, coeff, form="power", degree=2, state=State(*before), **context)
        return state.total, state.count

    checks = {"check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(function, leaves, **checks)
    total_alone = lambda *before: function(*leaves[:2], *before)[0]
    assert torch.autograd.gradcheck(total_alone, leaves[2:], **checks)
    totals = lambda *leaves: function(*leaves[:4], leaves[4].detach())[0]
    both_ways = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "fast_mode": True}
    assert torch.autograd.gradgradcheck(totals, leaves, **both_ways)

    leaves = [t.detach() for t in leaves]
    many = [torch.stack([t, t + 0.1, 2 * t]) for t in leaves]
    for dims in ((0, 0, 0, 0, 0), (0, None, None, None, None), (None, None, 0, 0, 0), (0, None, 0, None, None)):
        given = [t if dim is None else m for t, m, dim in zip(leaves, many, dims)]
        one_by_one = [function(*(t if dim is None else t[i] for t, dim in zip(given, dims))) for i in range(3)]
        for found, expected in zip(torch.func.vmap(function, dims)(*given), zip(*one_by_one), strict=True):
            torch.testing.assert_close(found, torch.stack(expected))


def test_batches_that_share_a_state_from_before_are_one_call(device):
    u, coeff = draw_leaves("power", 2, 6, 12, 7, device)
    before = State(*(t.to(device) for t in draw_prior(2, 7, torch.float32)))
    function = lambda u: polynomial_state(u, coeff, form="power", degree=2, state=before).total
    with Launches() as called:
        found = torch.func.vmap(function)(u.unflatten(0, (3, 2)))
    assert called.names.count("state") == 1
    torch.testing.assert_close(found, torch.stack([function(part) for part in u.split(2)]))


@pytest.mark.parametrize("moving", (("before",), ("u", "before"), ("count",)), ids=str)
def test_compiled_with_a_state_from_before(moving, device):
    torch._dynamo.reset()
    u, coeff = draw_leaves("power", 2, 2, 12, 7, device)
    total, count = torch.randn(2, 1, 7, device=device), torch.ones(2, 1, dtype=torch.float64, device=device)
    for name, leaf in {"u": u, "before": total, "count": count}.items():
        leaf.requires_grad_(name in moving)

    def function(u, coeff, total, count):
        before = State(total, torch.zeros_like(total), count)
        return polynomial_state(u, coeff, form="power", degree=2, frames=3, state=before).mean()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaves = [leaf for leaf in (u, total, count) if leaf.requires_grad]
    y, expected = (f(u, coeff, total, count) for f in (compiled, function))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (y, expected)))


@pytest.mark.parametrize("moving", ("x", "x, total", "total", "x, total, residual", "count"))
@pytest.mark.parametrize("context", ({}, {"frames": 7}), ids=str)
def test_tangents_of_a_projected_state_from_before(context, moving):
    """By one pass over the tokens where these move, and the same as of a projection and a state by themselves."""
    layer, moving = PoM(DIM, 3, form="power").double().requires_grad_(False), moving.split(", ")
    given = dict(zip(("total", "residual", "count"), draw_prior(2, 32)), x=torch.randn(2, TOKENS, DIM).double())

    def tangents(state):
        def function(*moved):
            at = given | dict(zip(moving, moved))
            before = State(at["total"], at["residual"], at["count"])
            found = state(at["x"], before)
            return found.total + found.residual, found.count

        return torch.func.jvp(function, tuple(given[n] for n in moving), tuple(given[n].flip(0) for n in moving))

    options = {"form": "power", "degree": 3, **context}
    expected = tangents(lambda x, before: polynomial_state(layer.context_proj(x), layer.coeff, state=before, **options))
    with Launches() as called:
        found = tangents(lambda x, before: projected_state(x, layer.context_proj, layer.coeff, state=before, **options))
    torch.testing.assert_close(found, expected)
    assert "project_state_along" in called.names or "x" not in moving


@pytest.mark.parametrize("keep", (False, True))
@pytest.mark.parametrize("context", ({}, {"frames": 7}, {"weight": True}, {"frames": [0, 0, 64, 70]}), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_a_projected_state_from_before_is_as_if_merged(dtype, context, keep):
    """As if it were merged, to what the residual rounds, in one operation; and so are gradients."""
    layer, x = PoM(DIM, 3, form="power").to(dtype), torch.randn(2, TOKENS, DIM).to(dtype).requires_grad_()
    context = context | ({"weight": torch.rand(2, TOKENS, dtype=state_dtype(dtype))} if "weight" in context else {})
    before = State(*draw_prior(2, 32, dtype))
    before.total.requires_grad_()
    state = lambda **more: projected_state(
        x, layer.context_proj, layer.coeff, form="power", degree=3, keep=keep, **context, **more
    )
    with Launches() as when_added:
        found = state(state=before)
    with Launches() as by_itself:
        alone = state()
    assert when_added.names == by_itself.names and "project_state" in by_itself.names
    merged = before + alone
    assert_as_if_merged(found, merged, before, alone)
    leaves = [x, before.total, *layer.context_proj.parameters(), layer.coeff]
    weights = torch.randn_like(found.total)
    grads = [torch.autograd.grad((weights * each.total).sum(), leaves) for each in (found, merged)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("context", ({}, {"frames": 2}), ids=str)
def test_derivatives_of_a_projected_state_from_before(context):
    layer = PoM(4, 2, 1, form="power", bias=True).double()
    weights = [*layer.context_proj.parameters(), layer.coeff]
    leaves = [t.detach().requires_grad_() for t in (torch.rand(2, 4, 4).double(), *draw_prior(2, 4), *weights)]

    def function(x, total, residual, count, weight, bias, coeff):
        projection = SimpleNamespace(weight=weight, bias=bias)
        before = State(total, residual, count)
        state = projected_state(x, projection, coeff, form="power", degree=2, state=before, **context)
        return state.total, state.count

    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    totals = lambda *leaves: function(*leaves[:3], leaves[3].detach(), *leaves[4:])[0]
    torch.autograd.gradgradcheck(totals, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)
    plain = tuple(t.detach() for t in leaves)
    many = [torch.stack([t, t + 0.1]) for t in plain]
    one_by_one = [function(*values) for values in zip(*many)]
    for found, expected in zip(torch.func.vmap(function)(*many), zip(*one_by_one), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
