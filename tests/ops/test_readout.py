"""Reading a state through gates: which query reads which group, values and gradients."""

import pytest
import torch
from cases import (
    DTYPES,
    FORMS,
    Case,
    assert_accurate,
    draw_inputs,
    draw_rotary,
    grid,
    move,
    offsets,
    run_op,
    state_dtype,
    with_gradients,
)

from pom_ext import State, polynomial_readout, polynomial_state
from pom_ext.ops import reference

GROUPS = {  # how many groups, how many queries, and the argument that deals the queries to the groups
    "one": (1, 9, {}),
    "one-none": (1, 0, {}),
    "evenly": (4, 12, {}),
    "each": (7, 7, {}),
    "frames": (3, 12, {"frames": 4}),
    "frames_unequal": (4, 9, {"frames": [0, 2, 2, 3, 9]}),
    "cu_seqlens": (4, 129, {"cu_seqlens": torch.tensor([0, 60, 60, 61, 129])}),
}


@pytest.mark.parametrize("heads", (1, 4), ids=lambda heads: f"h{heads}")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(form, dtype, groups, heads, device):
    n_groups, queries, dealt = GROUPS[groups]
    batch, width, wide = 3, 20, state_dtype(dtype)
    leaves = {
        "gate": (torch.randn(batch, queries, width if heads == 1 else heads) * 2).to(dtype),
        "total": torch.randn(batch, n_groups, width, dtype=wide) * 4,
    }
    residual = leaves["total"] * torch.finfo(wide).eps / 4
    count = torch.rand(batch, n_groups, dtype=torch.float64) + 0.5
    count[0, -1] = 0  # reads zero
    rotary = draw_rotary(queries, leaves["gate"].shape[-1], 2, wide) if form == "power" else None

    def op(gate, total):
        state = State(total=total, residual=residual.to(device), count=count.to(device))
        y = polynomial_readout(
            gate, state, form=form, n_sel_heads=heads, rotary=move(rotary, device), **move(dealt, device)
        )
        return {"y": y}

    def definition(gate, total):
        edges = offsets(dealt.get("frames", dealt.get("cu_seqlens")), queries)
        total = total + residual.to(total.dtype)
        y = reference.readout(
            gate, total, count.to(gate.dtype), form=form, n_sel_heads=heads, query_offsets=edges,
            rotary=move(rotary, dtype=gate.dtype),
        )  # fmt: skip
        return {"y": y}

    grads = {"y": (1 + torch.randn(batch, queries, width)).to(dtype)}
    results = with_gradients(op, move(leaves, device), move(grads, device))
    exact, plain = (
        with_gradients(definition, move(leaves, dtype=d), move(grads, dtype=d)) for d in (torch.float64, dtype)
    )
    assert results["y"].dtype == dtype and results["grad total"].dtype == wide
    assert not results["grad total"][0, -1].any()  # of the empty context
    assert_accurate(results, exact, plain, Case(form, 1, dtype=dtype, width=width, heads=heads))


@pytest.mark.parametrize("case", grid(degrees=(3,), dtypes=(torch.float32, torch.bfloat16)), ids=str)
def test_state_then_readout_is_mix(case, device):
    inputs = draw_inputs(case)
    leaves, (context, rotaries) = move(inputs.leaves, device), move((inputs.context, inputs.rotaries), device)
    prior = None
    if case.prior:
        prior = State(leaves["prior"], inputs.prior_residual.to(device), inputs.prior_count.to(device))
    form = {"form": case.form}
    state = polynomial_state(
        leaves["u"],
        leaves.get("coeff"),
        degree=case.degree,
        rotary=rotaries.get("rotary"),
        state=prior,
        **form,
        **context,
    )
    dealt = {name: context[name] for name in ("frames", "cu_seqlens") if name in context}
    y = polynomial_readout(
        leaves["gate"], state, n_sel_heads=case.heads, rotary=rotaries.get("gate_rotary"), **form, **dealt
    )
    tolerance = torch.finfo(case.dtype).eps * 8
    torch.testing.assert_close(y, run_op(inputs, device)["y"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, device):
    gate = torch.randn(2, 6, 3, dtype=torch.float64, device=device).requires_grad_()
    total = torch.randn(2, 3, 6, dtype=torch.float64, device=device).requires_grad_()
    count = torch.tensor([[1.0, 0.0, 2.5], [3.0, 1.0, 0.5]], dtype=torch.float64, device=device)

    def read(gate, total):
        state = State(total=total, residual=torch.zeros_like(total), count=count)
        return polynomial_readout(gate, state, form=form, n_sel_heads=3, frames=[0, 1, 1, 6])

    assert torch.autograd.gradcheck(read, (gate, total))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_state_reads_zero(form, dtype, device):
    gate = torch.randn(2, 5, 8, device=device).to(dtype).requires_grad_()
    y = polynomial_readout(gate, State.empty(2, 8, dtype=state_dtype(dtype), device=device), form=form)
    y.sum().backward()
    assert y.dtype == dtype and y.shape == (2, 5, 8)
    assert not y.any() and not gate.grad.any()


def test_the_residual_is_read(device):
    """What the total cannot hold still counts: here all of the state is in the residual."""
    zero = torch.zeros(1, 1, 4, device=device)
    state = State(total=zero, residual=zero + 3, count=torch.full((1, 1), 2.0, dtype=torch.float64, device=device))
    y = polynomial_readout(zero, state, form="power")  # a gate of one half
    torch.testing.assert_close(y, zero + 0.75)


def test_many_readers_of_one_state(device):
    """Gradients of several readouts of one state add up."""
    u = torch.randn(2, 9, 6, device=device).requires_grad_()
    gates = torch.randn(2, 5, 6, device=device)
    state = polynomial_state(u, form="product", degree=2)
    parts = [polynomial_readout(gates[:, i : i + 1], state, form="product") for i in range(5)]
    (apart,) = torch.autograd.grad(torch.cat(parts, dim=1).sum(), u)
    state = polynomial_state(u, form="product", degree=2)
    (together,) = torch.autograd.grad(polynomial_readout(gates, state, form="product").sum(), u)
    torch.testing.assert_close(apart, together)
