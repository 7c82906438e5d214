"""Forward-mode and second derivatives of the operations, in every form and mode: against the definition, against finite
differences, under torch.func and torch.compile. A derivative that is not there raises; it is never zero."""

import functools

import pytest
import torch
from cases import (
    FORMS,
    MODES,
    Case,
    assert_accurate,
    draw_inputs,
    grid,
    move,
    op_function,
    reference_function,
    twice_differentiable_gate,
)

from pom_ext import State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.ops import reference


def second_derivatives(function, leaves, output_grads, directions):
    """Tangents of the outputs, and the gradient of how the gradients change in the same directions."""
    _, tangents = torch.func.jvp(lambda leaves: function(**leaves), (leaves,), (directions,))
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    output_grads = {name: grad.detach().requires_grad_() for name, grad in output_grads.items()}
    outputs = function(**leaves)
    output_grads = {name: output_grads[name] for name in outputs}
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(output_grads.values()), create_graph=True
    )
    change = sum((grad * directions[name].to(grad.dtype)).sum() for name, grad in zip(leaves, grads, strict=True))
    inputs = {f"second {name}": leaf for name, leaf in (leaves | output_grads).items()}
    second = torch.autograd.grad(change, list(inputs.values()), materialize_grads=True)
    results = {f"tangent {name}": tangent for name, tangent in tangents.items()} | dict(
        zip(inputs, second, strict=True)
    )
    return {name: result.detach() for name, result in results.items()}


def draw_directions(leaves):
    """Short ones, so that plain torch stays within float16."""
    return {name: (torch.randn(leaf.shape) / 8).to(leaf) for name, leaf in leaves.items()}


# Widths that a GPU reads four elements at a time.
ALIGNED = [
    Case(form, degree, mode, dtype, 2, 70, width, None, heads, axes)
    for mode in ("whole", "causal", "frames")
    for form, degree, width, heads, axes in (
        ("product", 2, 64, 1, 0), ("product", 3, 64, 8, 0), ("power", 2, 64, 1, 0), ("power", 3, 64, 8, 0),
        ("power", 3, 64, 1, 2), ("product", 2, 36, 1, 0), ("power", 3, 36, 3, 0),
    )
    for dtype in (torch.float32, torch.bfloat16)
]  # fmt: skip


@pytest.mark.parametrize("case", grid(degrees=(1, 2, 3, 5)) + ALIGNED, ids=str)
def test_against_the_definition(case, device, monkeypatch):
    monkeypatch.setattr(reference, "gate_value", twice_differentiable_gate)
    inputs = draw_inputs(case)
    directions = draw_directions(inputs.leaves)

    def run(function, device, dtype):
        given = (move(each, device, dtype) for each in (inputs.leaves, inputs.output_grads, directions))
        return second_derivatives(function, *given)

    results = run(op_function(inputs, device), device, None)
    exact = run(reference_function(inputs, torch.float64), "cpu", torch.float64)
    plain = run(reference_function(inputs, case.dtype), "cpu", case.dtype)
    assert_accurate(results, exact, plain, case)


def small(form, mode, heads=1, axes=0, prior=False, degree=2):
    """A case for derivatives entry by entry, in float64."""
    width = 2 if form == "product" else 4
    case = Case(form, degree, mode, torch.float64, 2, 5, width, None, heads, axes, prior)
    inputs = draw_inputs(case)
    function, names = op_function(inputs), list(inputs.leaves)

    def of_leaves(*leaves):
        return tuple(function(**dict(zip(names, leaves, strict=True))).values())

    return of_leaves, [leaf.detach().contiguous().requires_grad_() for leaf in inputs.leaves.values()]


CHECKED = [
    *((form, mode, {}) for form in FORMS for mode in MODES),
    *((form, mode, {"heads": 2}) for form in FORMS for mode in ("whole", "causal", "frames")),
    *((form, mode, {"prior": True}) for form in FORMS for mode in ("whole", "causal+weight", "frames")),
    *(("power", mode, {"axes": 1, "heads": heads}) for mode in ("whole", "causal", "frames") for heads in (1, 4)),
]


@pytest.mark.parametrize("form,mode,options", CHECKED, ids=str)
def test_against_finite_differences(form, mode, options):
    function, leaves = small(form, mode, **options)
    check = {"fast_mode": True, "check_batched_grad": False}
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, **check)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, **check)
    directions = tuple(torch.randn_like(leaf) for leaf in leaves)
    reverse_over_forward = lambda *leaves: torch.func.jvp(function, leaves, directions)[1]
    assert torch.autograd.gradcheck(reverse_over_forward, leaves, **check)


@pytest.mark.parametrize("mode", ("whole", "mask", "causal", "frames"))
@pytest.mark.parametrize("form", FORMS)
def test_every_entry_and_every_batch_of_them(form, mode):
    function, leaves = small(form, mode)
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)


@pytest.mark.parametrize(
    "form,mode", [(form, mode) for form in FORMS for mode in ("whole", "causal", "frames", "mask")]
)
def test_jacobians_and_hessians(form, mode):
    function, leaves = small(form, mode, prior=mode != "mask")
    leaves = tuple(leaf.detach() for leaf in leaves)
    positions = tuple(range(len(leaves)))
    forward, reverse = (
        jacobian(function, argnums=positions)(*leaves) for jacobian in (torch.func.jacfwd, torch.func.jacrev)
    )
    torch.testing.assert_close(forward, reverse)

    def scalar(*leaves):
        return sum(
            (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).sum() for output in function(*leaves)
        )

    hessian = torch.func.hessian(scalar, argnums=positions)(*leaves)
    other_way = torch.func.jacrev(torch.func.jacrev(scalar, argnums=positions), argnums=positions)(*leaves)
    torch.testing.assert_close(hessian, other_way)
    for i in positions:
        for j in positions:
            n, m = leaves[i].numel(), leaves[j].numel()
            torch.testing.assert_close(hessian[i][j].reshape(n, m), hessian[j][i].reshape(m, n).mT)


@pytest.mark.parametrize("mode", ("whole", "weight", "mask", "causal", "frames", "cu_seqlens"))
@pytest.mark.parametrize("form", FORMS)
def test_vmap(form, mode):
    """Of samples, of coefficients, of both; and of gradients."""
    function, leaves = small(form, mode)
    names = ("u", "gate", "coeff")[: len(leaves)]
    many = [torch.stack([leaf.detach() + 0.1 * i for i in range(3)]) for leaf in leaves]
    for batched in (("u", "gate"), ("u",), ("coeff",), names):
        if not set(batched) <= set(names):
            continue
        dims = tuple(0 if name in batched else None for name in names)
        given = tuple(many[i] if dim == 0 else many[i][0] for i, dim in enumerate(dims))
        one_by_one = [function(*(t[k] if dim == 0 else t for t, dim in zip(given, dims))) for k in range(3)]
        for result, expected in zip(torch.func.vmap(function, dims)(*given), zip(*one_by_one), strict=True):
            torch.testing.assert_close(result, torch.stack(expected))
        gradient = torch.func.grad(lambda *leaves: function(*leaves)[0].square().sum(), tuple(range(len(names))))
        one_by_one = [gradient(*(t[k] if dim == 0 else t for t, dim in zip(given, dims))) for k in range(3)]
        for result, expected in zip(torch.func.vmap(gradient, dims)(*given), zip(*one_by_one), strict=True):
            torch.testing.assert_close(result, torch.stack(expected))


def test_vmap_of_nothing():
    empty = torch.empty(3, 0, 5, 4)
    y = torch.func.vmap(lambda u, gate: polynomial_mix(u, gate, form="product", degree=2))(empty, empty)
    assert y.shape == empty.shape


@pytest.mark.parametrize("mode", ("whole", "causal", "frames"))
@pytest.mark.parametrize("form", FORMS)
def test_compiled(form, mode):
    """jvp inside one graph, with the gradient through its value, as MeanFlow takes it."""
    function, leaves = small(form, mode)
    directions = tuple(torch.randn_like(leaf) for leaf in leaves)

    def loss(*leaves):
        value, tangent = torch.func.jvp(function, leaves, directions)
        return (value[0] - tangent[0].detach()).square().sum(), tangent[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    step = 1e-6
    ahead, behind = (function(*(x + s * d for x, d in zip(leaves, directions)))[0] for s in (step, -step))
    value, tangent = compiled(*leaves)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(loss(*leaves)[0], leaves))


@pytest.mark.parametrize("compiled", (False, True))
def test_no_tangent_vanishes(compiled):
    """Where a derivative is not defined, one that is asked for raises."""
    u, gate = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mix = functools.partial(polynomial_mix, form="product", degree=2)
    weight, mask, state = torch.rand(2, 5), torch.rand(2, 5, 5), State.empty(2, 4)

    def tangent(function, *at):
        run = lambda *at: torch.func.jvp(function, at, tuple(torch.ones_like(x) for x in at))
        return (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(*at)

    with pytest.raises(Exception, match="weight: expected no tangent"):
        tangent(lambda weight: mix(u, gate, weight=weight), weight)
    with pytest.raises(Exception, match="mask: expected no tangent"):
        tangent(lambda mask: polynomial_state(u, form="product", degree=2, mask=mask).total, mask)
    with pytest.raises(Exception, match="in place has no derivative"):
        tangent(lambda u: polynomial_update(u, gate, state, form="product", degree=2), u)
    with pytest.raises(Exception, match="third derivatives are not defined"):
        tangent(lambda u: torch.func.jvp(lambda u: mix(u, gate), (u,), (u,))[1], u)


def test_third_derivatives_raise():
    u, gate = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    grad = polynomial_mix(u, gate, form="product", degree=2).sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(grad, u, create_graph=True)
        grad = grad.square().sum()
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(grad, u)


def test_a_tangent_in_other_strides():
    """Channels apart, tokens first, one row for all."""
    u, gate = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    mix = functools.partial(polynomial_mix, form="product", degree=2)
    directions = (
        torch.randn(2, 6, 5, dtype=torch.float64).mT,
        torch.randn(5, 2, 6, dtype=torch.float64).transpose(0, 1),
        torch.randn(6, dtype=torch.float64).expand(2, 5, 6),
        torch.randn(2, 5, 12, dtype=torch.float64)[..., ::2],
    )
    for direction in directions:
        _, tangent = torch.func.jvp(mix, (u, gate), (direction, direction))
        dense = direction.contiguous()
        assert torch.equal(tangent, torch.func.jvp(mix, (u, gate), (dense, dense))[1])


def test_the_tangent_of_a_state_is_a_state():
    """Derivatives of pieces add up to the derivative of the whole, as states do, and can be read."""
    u, direction, gate = torch.randn(3, 2, 8, 4, dtype=torch.float64).unbind()

    def in_pieces(u):
        state = sum((polynomial_state(part, form="product", degree=2) for part in u.split(3, 1)[1:]), start=polynomial_state(u[:, :3], form="product", degree=2))  # fmt: skip
        return polynomial_readout(gate, state, form="product")

    whole = functools.partial(polynomial_mix, gate=gate, form="product", degree=2)
    torch.testing.assert_close(
        torch.func.jvp(in_pieces, (u,), (direction,)), torch.func.jvp(lambda u: whole(u), (u,), (direction,))
    )
