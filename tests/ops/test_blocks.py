"""What a GPU does with projections block by block, there and on the CPU: the same results, and no needless launch."""

import pytest
import torch
from cases import FLOOR, Launches, draw_prior, move, norm_error, state_dtype

from pom_ext import PoM, State
from pom_ext.ops import projected_cuda
from pom_ext.ops.arguments import OPERATIONS, Gate, Polynomial, Projection, call

DIM = 16


def on(device, value):
    """A module or tensors, in tuples, on a device."""
    return value.to(device) if isinstance(value, torch.nn.Module) else move(value, device)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(projected_cuda, "BLOCK_BYTES", 0)
    monkeypatch.setattr(projected_cuda, "LEAST_ROWS", 16)


def as_on_a_gpu(name, *groups, **arguments):
    """`call`, by the products and kernels that a GPU takes in turn, on any device."""
    args = dict(OPERATIONS[name].defaults)
    for group in (*groups, arguments):
        args |= group
    return projected_cuda.IMPLEMENTATIONS[name](args)


NO_STATE = {"total": None, "residual": None, "count": None}


@pytest.mark.parametrize("prior", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("tokens, batch", [(70, 2), (5, 7), (3, 0), (0, 2)])
@pytest.mark.parametrize("form", ("power", "product"))
def test_blocks_of_a_gpu(form, tokens, batch, bias, prior, small_blocks, device):
    """Outputs and gradients are those of the CPU's own operations."""
    layer = PoM(DIM, 3, form=form, rope="1d" if form == "power" else None, bias=bias).double().requires_grad_(False)
    x, grad_y = torch.randn(2, batch, tokens, DIM, dtype=torch.float64)
    width = 32 if form == "power" else 96
    weights, grad_total = torch.rand(batch, tokens, dtype=torch.float64), torch.randn(batch, 1, width)
    before = draw_prior(batch, width) if prior else None
    rotary, gate_rotary = layer._rotaries(x, x, None, None)

    def run(call, x, grad_y, grad_total, layer, weights, before, rotary, gate_rotary):
        context, gate, out = (
            Projection(p.weight, p.bias) for p in (layer.context_proj, layer.gate_proj, layer.out_proj)
        )
        tokens = {"x": x, "weight": weights, **context.to_kernel("context")}
        tokens |= Polynomial(form, 3, layer.coeff, rotary).to_kernel(x.dtype)
        prior = NO_STATE if before is None else State(*before).to_kernel()
        *state, _, _, saved = call("project_state", tokens, prior)
        needs = {"needs_x": True, "needs_weight": True}
        back = call("project_state_backward", tokens, needs, grad_total=grad_total.double())
        assert saved.numel() == 0
        reading = {"x": x, "form": int(form == "power"), **gate.to_kernel("gate"), **out.to_kernel("out")}
        reading |= State(*state).to_kernel() | Gate(None, 1, gate_rotary).to_kernel()
        y = call("project_readout", reading)[0]
        return *state, *back, y, *call("project_readout_backward", reading, grad_y=grad_y)

    given = x, grad_y, grad_total, layer, weights, before, rotary, gate_rotary
    expected = run(call, *given)
    found = run(as_on_a_gpu, *(on(device, part) for part in given))
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape, i
        if i != 1:  # the residual: rounding of the total
            torch.testing.assert_close(one.cpu(), other, msg=lambda text, i=i: f"{i}: {text}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_blocks_of_a_gpu_in_other_dtypes(dtype, small_blocks, device):
    """Gradients of weights and biases are summed over blocks in float32: they are rounded once."""
    layer = PoM(DIM, 3, form="power", bias=True).to(dtype).requires_grad_(False)
    x, grad_y = torch.randn(2, 2, 300, DIM).to(dtype)
    grad_total, before = torch.randn(2, 1, 32), draw_prior(2, 32, dtype)

    def run(call, dtype, device):
        to = lambda t, dtype: t.to(device, dtype)
        x_, grad_y_, grad_total_ = to(x, dtype), to(grad_y, dtype), to(grad_total, state_dtype(dtype))
        context, gate, out = layer.context_proj, layer.gate_proj, layer.out_proj
        context, gate, out = (Projection(to(p.weight, dtype), to(p.bias, dtype)) for p in (context, gate, out))
        tokens = {"x": x_, "coeff": to(layer.coeff, state_dtype(dtype)), "form": 1, "degree": 3}
        tokens |= context.to_kernel("context")
        prior = State(*(to(t, state_dtype(dtype)) for t in before[:2]), before[2].to(device)).to_kernel()
        state = call("project_state", tokens, prior)[:3]
        needs = {"needs_x": True, "needs_weight": True}
        back = call("project_state_backward", tokens, needs, grad_total=grad_total_)
        reading = {"x": x_, "form": 1, "heads": 1, **gate.to_kernel("gate"), **out.to_kernel("out")}
        reading |= State(*state).to_kernel()
        y = call("project_readout", reading)[0]
        return *state, *back, y, *call("project_readout_backward", reading, grad_y=grad_y_)

    found, exact = run(as_on_a_gpu, dtype, device), run(call, torch.float64, "cpu")
    for i, (one, other) in enumerate(zip(found, exact, strict=True)):
        if i != 1:
            assert norm_error(one, other) <= 3 * FLOOR[one.dtype if i < 3 else dtype] + FLOOR[dtype], i


@pytest.mark.parametrize("prior", (False, True))
@pytest.mark.parametrize("batch, tokens, count", [(1, 64, 4), (1, 70, 5), (3, 20, 6), (9, 5, 3)])
def test_launches_of_blocks(batch, tokens, count, prior, small_blocks, device):
    """A block of a state is a product, with its bias, and a kernel. So is that of a readout, with another product."""
    x, grad_y = torch.randn(2, batch, tokens, DIM)
    weight, bias, coeff = torch.randn(32, DIM), torch.randn(32), torch.randn(32, 3)
    x, grad_y, weight, bias, coeff = on(device, (x, grad_y, weight, bias, coeff))
    before = State(*on(device, draw_prior(batch, 32, torch.float32))).to_kernel() if prior else NO_STATE
    given = {"x": x, "coeff": coeff, "form": 1, "degree": 3, **Projection(weight, bias).to_kernel("context")}
    given["weight"] = torch.rand(batch, tokens, device=device)
    with Launches() as state:
        summed = as_on_a_gpu("project_state", given, before)[:3]
    assert state.names == ["linear", "add_to_state"] * count
    reading = {
        "x": x,
        "form": 1,
        "heads": 1,
        **State(*summed).to_kernel(),
        **Projection(weight, bias).to_kernel("gate"),
    }
    reading |= Projection(weight.t().contiguous(), bias[:DIM]).to_kernel("out")
    with Launches() as readout:
        as_on_a_gpu("project_readout", reading)
    assert readout.names == ["linear", "readout", "addmm"] * count

    with Launches() as back:
        as_on_a_gpu("project_state_backward", given, grad_total=summed[0], needs_x=True, needs_weight=True)
    block = ["linear", "state_backward", "mm", "addmm", "sum", "add_"]  # the first product and sum are not added
    first = ["linear", "state_backward", "mm", "mm", "sum"]
    assert back.names == [*first, *block * (count - 1), "sum"]
    with Launches() as back:
        as_on_a_gpu("project_readout_backward", reading, grad_y=grad_y)
    block = ["linear", "readout", "linear", "readout_backward", "mm", "addmm", "sum", "addmm", "sum"]
    first = ["linear", "readout", "linear", "readout_backward", "mm", "mm", "sum", "mm", "sum"]
    without_total = [name for name in back.names if name not in ("copy_", "add_")]
    assert without_total == [*first, *block * (count - 1), "sum", "sum"]
    assert len(back.names) == len(without_total) + count


def test_refused_additions():
    """What is added to is the caller's own memory, and there is one state to start from."""
    u, before = torch.randn(2, 5, 4), draw_prior(2, 4, torch.float32)
    state = [t.clone() for t in before]

    def add(prior, empty, state):
        prior = dict(zip(("prior_total", "prior_residual", "prior_count"), prior))
        return call("add_to_state", State(*state).to_kernel(), prior, u=u, degree=2, empty=empty)

    nothing = (None, None, None)
    with pytest.raises(RuntimeError, match="prior: expected None"):
        add(before, False, state)
    with pytest.raises(RuntimeError, match="prior: incomplete state"):
        add((before[0], None, None), True, state)
    with pytest.raises(RuntimeError, match="total: expected a contiguous tensor"):
        add(nothing, False, (torch.randn(2, 1, 8)[..., ::2], *state[1:]))
    with pytest.raises(RuntimeError, match="total: unexpected shape"):
        add(nothing, False, (torch.randn(2, 2, 4), *state[1:]))
    with pytest.raises(RuntimeError, match="in place has no derivative"):
        torch.func.jvp(lambda total: add(nothing, False, (total, *state[1:])), (state[0],), (state[0],))
    with pytest.raises(RuntimeError, match="in place has no derivative"):
        add(nothing, False, (state[0].clone().requires_grad_(), *state[1:]))
    assert all(map(torch.equal, state, before))


def test_blocks_write_what_they_are_given(small_blocks):
    """Tokens in other strides, and states that nobody else may see change."""
    x = torch.randn(2, DIM, 70).mT
    weight, coeff, before = torch.randn(32, DIM), torch.randn(32, 3), draw_prior(2, 32, torch.float32)
    kept = [t.clone() for t in before]
    given = {"context_weight": weight, "coeff": coeff, "form": 1, "degree": 3, **State(*before).to_kernel()}
    run = lambda x: as_on_a_gpu("project_state", given, x=x)
    for one, other in zip(run(x), run(x.contiguous()), strict=True):
        torch.testing.assert_close(one, other)
    assert all(map(torch.equal, before, kept))
