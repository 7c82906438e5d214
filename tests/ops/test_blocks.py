"""What a GPU does with projections block by block, there and on the CPU: the same results, and no needless launch."""

import pytest
import torch
from cases import FLOOR, Launches, draw_prior, move, norm_error, state_dtype

from pom_ext import PoM
from pom_ext.ops import _blocks
from pom_ext.ops.functional import angles_of

DIM = 16


def on(device, value):
    """A module or tensors, in tuples, on a device."""
    return value.to(device) if isinstance(value, torch.nn.Module) else move(value, device)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 0)
    monkeypatch.setattr(_blocks, "LEAST_ROWS", 16)


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
    before = draw_prior(batch, width) if prior else (None, None, None)
    rotary, gate_rotary = layer._rotaries(x, x, None, None)
    rest = int(form == "power"), 3

    def run(ops, x, grad_y, grad_total, layer, weights, before, rotary, gate_rotary):
        projection = x, layer.context_proj.weight, layer.context_proj.bias, layer.coeff
        groups, angles = (weights, None, False), (*angles_of(rotary), *rest)
        *state, kept = ops.project_state(*projection, *groups, *before, *angles, False)
        back = ops.project_state_backward(grad_total.double(), *projection, *groups, *angles, None, True, True)
        assert kept.numel() == 0
        gate, out = ((p.weight, p.bias) for p in (layer.gate_proj, layer.out_proj))
        reading = x, *gate, *state, *out, None, *angles_of(gate_rotary), rest[0], 1
        return (
            *state,
            *back,
            ops.project_readout(*reading, False)[0],
            *ops.project_readout_backward(grad_y, *reading, None),
        )

    given = x, grad_y, grad_total, layer, weights, before, rotary, gate_rotary
    expected = run(torch.ops.pom_ext, *given)
    found = run(_blocks, *(on(device, part) for part in given))
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

    def run(ops, dtype, device):
        to = lambda t, dtype: t.to(device, dtype)
        x_, grad_y_, grad_total_ = to(x, dtype), to(grad_y, dtype), to(grad_total, state_dtype(dtype))
        context, gate, out = layer.context_proj, layer.gate_proj, layer.out_proj
        weights = [to(t, dtype) for p in (context, gate, out) for t in (p.weight, p.bias)]
        coeff = to(layer.coeff, state_dtype(dtype))
        prior = [to(t, state_dtype(dtype)) for t in before[:2]] + [before[2].to(device)]
        rest, projection = (None, None, 0, 1), (x_, *weights[:2], coeff, None, None, False)
        *state, _ = ops.project_state(*projection, *prior, *rest, 3, False)
        back = ops.project_state_backward(grad_total_, *projection, *rest, 3, None, True, True)
        reading = x_, *weights[2:4], *state, *weights[4:], None, *rest, 1
        y, _ = ops.project_readout(*reading, False)
        return *state, *back, y, *ops.project_readout_backward(grad_y_, *reading, None)

    found, exact = run(_blocks, dtype, device), run(torch.ops.pom_ext, torch.float64, "cpu")
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
    before = on(device, draw_prior(batch, 32, torch.float32)) if prior else (None, None, None)
    groups, angles = (torch.rand(batch, tokens, device=device), None, False), (None, None, 0, 1)
    weights = weight, bias
    with Launches() as state:
        *summed, _ = _blocks.project_state(x, *weights, coeff, *groups, *before, *angles, 3)
    assert state.names == ["linear", "add_to_state"] * count
    reading = x, *weights, *summed, weight.t().contiguous(), bias[:DIM], None, *angles, 1
    with Launches() as readout:
        _blocks.project_readout(*reading)
    assert readout.names == ["linear", "readout", "addmm"] * count

    with Launches() as back:
        _blocks.project_state_backward(summed[0], x, *weights, coeff, *groups, *angles, 3, None, True, True)
    block = ["linear", "state_backward", "mm", "addmm", "sum", "add_"]  # the first product and sum are not added
    first = ["linear", "state_backward", "mm", "mm", "sum"]
    assert back.names == [*first, *block * (count - 1), "sum"]
    with Launches() as back:
        _blocks.project_readout_backward(grad_y, *reading, None)
    block = ["linear", "readout", "linear", "readout_backward", "mm", "addmm", "sum", "addmm", "sum"]
    first = ["linear", "readout", "linear", "readout_backward", "mm", "mm", "sum", "mm", "sum"]
    without_total = [name for name in back.names if name not in ("copy_", "add_")]
    assert without_total == [*first, *block * (count - 1), "sum", "sum"]
    assert len(back.names) == len(without_total) + count


def test_refused_additions():
    """What is added to is the caller's own memory, and there is one state to start from."""
    u, before = torch.randn(2, 5, 4), draw_prior(2, 4, torch.float32)
    state = [t.clone() for t in before]
    add = lambda prior, empty, state: torch.ops.pom_ext.add_to_state(
        u, None, None, *prior, None, None, 0, 0, 2, empty, *state
    )
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
    run = lambda x: _blocks.project_state(x, weight, None, coeff, None, None, False, *before, None, None, 0, 1, 3)
    for one, other in zip(run(x), run(x.contiguous()), strict=True):
        torch.testing.assert_close(one, other)
    assert all(map(torch.equal, before, kept))
