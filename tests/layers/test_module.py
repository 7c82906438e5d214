"""The layer: every constructor argument, every context, cross mixing, streaming, and what modules must be able to do."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cases import norm_error, offsets
from layer_cases import CONTEXTS, DIM, LAYERS, TOKENS, build, positions_of

from pom_ext import PoM, State
from pom_ext.ops import reference


def definition(layer, x, context, rotaries=(None, None), **modes):
    """The layer in plain torch, from its parameters."""
    weight = layer.context_proj.weight
    if weight.dim() == 3:  # grouped
        weight = torch.block_diag(*weight)
    u, gate = F.linear(context, weight, layer.context_proj.bias), layer.gate_proj(x)
    mixed = reference.mix(
        u, gate, layer.coeff, form=layer.form, degree=layer.degree, n_sel_heads=layer.n_sel_heads,
        rotary=rotaries[0], gate_rotary=rotaries[1], **modes,
    )  # fmt: skip
    return layer.out_proj(mixed)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_definition(name, context, device):
    """In float64: the output, and the gradients of x and of every parameter."""
    layer = build(name, device, torch.float64)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, device=device).requires_grad_()
    modes = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in CONTEXTS[context].items()}
    positions = positions_of(layer, TOKENS, device)
    y = layer(x, **modes, **positions)
    exact_layer, exact_x = copy.deepcopy(layer).cpu(), x.detach().cpu().requires_grad_()
    rotaries = layer._rotaries(x, x, positions.get("positions"), None)
    rotaries = [r and type(r)(r.cos.cpu(), r.sin.cpu(), r.axes) for r in rotaries]
    modes = {key: offsets(value, TOKENS) if key == "frames" else value for key, value in CONTEXTS[context].items()}
    exact = definition(exact_layer, exact_x, exact_x, rotaries, **modes)
    assert norm_error(y.detach(), exact.detach()) < 1e-12
    grad = torch.randn_like(exact)
    y.backward(grad.to(device))
    exact.backward(grad)
    assert norm_error(x.grad, exact_x.grad) < 1e-11
    for (parameter_name, parameter), other in zip(layer.named_parameters(), exact_layer.parameters(), strict=True):
        assert norm_error(parameter.grad, other.grad) < 1e-11, parameter_name


@pytest.mark.parametrize("context", ("whole", "weight", "mask"))
@pytest.mark.parametrize("name", [name for name in LAYERS if "d-" not in name])
def test_cross_mixing(name, context, device):
    """Queries and context are different tokens, of different number."""
    layer = build(name, device, torch.float64)
    x = torch.randn(2, 5, DIM, dtype=torch.float64, device=device)
    other = torch.randn(2, TOKENS, DIM, dtype=torch.float64, device=device)
    modes = {key: value.to(device) for key, value in CONTEXTS[context].items()}
    if context == "mask":
        modes["mask"] = modes["mask"][:, :5]
    rotaries = layer._rotaries(x, other, None, None)
    y = layer(x, other, **modes)
    assert y.shape == (2, 5, DIM)
    assert norm_error(y.detach(), definition(layer, x, other, rotaries, **modes).detach().cpu()) < 1e-12
    assert not torch.allclose(y, layer(x, other.flip(-1), **modes))


def test_shapes_and_parameters():
    layer = PoM(8, degree=3, expand=2)
    assert (layer.context_proj.weight.shape, layer.gate_proj.weight.shape) == ((48, 8), (48, 8))
    assert layer.out_proj.weight.shape == (8, 48) and layer.coeff is None
    assert all(linear.bias is not None for linear in (layer.context_proj, layer.gate_proj, layer.out_proj))
    layer = PoM(8, degree=3, expand=2, form="power", n_groups=4, n_sel_heads=4)
    assert layer.context_proj.weight.shape == (4, 4, 2) and layer.gate_proj.weight.shape == (4, 8)
    assert layer.coeff.shape == (16, 3) and layer.out_proj.weight.shape == (8, 16)
    assert layer.context_proj.bias is None and layer.out_proj.bias is None and layer.gate_proj.bias is not None
    assert "degree=3" in repr(layer) and "n_sel_heads=4" in repr(layer)


def test_an_empty_context_gives_the_bias(device):
    """The authors' guidance without text relies on it."""
    layer, x = build("product-default", device), torch.randn(2, 5, DIM, device=device)
    bias = layer.out_proj.bias.expand(2, 5, DIM)
    assert torch.equal(layer(x, x[:, :0]), bias)
    weight = torch.ones(2, 5, device=device)
    weight[1] = 0
    y = layer(x, weight=weight)
    assert torch.equal(y[1], bias[1]) and not torch.allclose(y[0], bias[0])
    assert y.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ("frames", "causal"))
def test_streaming_equals_the_whole(name, how, device):
    """Frame after frame, or token after token, with the state handed on; forward and backward."""
    layer = build(name, device, torch.float64)
    x = torch.randn(2, 12, DIM, dtype=torch.float64, device=device).requires_grad_()
    positions = positions_of(layer, 12, device).get("positions")
    step = 3 if how == "frames" else 1
    outputs, state = [], None
    for start in range(0, 12, step):
        now = slice(start, start + step)
        y, state = layer(
            x[:, now], positions=None if positions is None else positions[now], state=state, return_state=True
        )
        assert isinstance(state, State) and state.total.shape == (2, 1, layer.state_width)
        outputs.append(y)
    modes = {"frames": 3} if how == "frames" else {"causal": True}
    whole, last = layer(x, positions=positions, return_state=True, **modes)
    assert norm_error(torch.cat(outputs, 1).detach(), whole.detach().cpu()) < 1e-12
    assert norm_error(state.mean().detach(), last.mean().detach().cpu()) < 1e-12
    assert torch.equal(state.count, torch.full_like(state.count, 12))
    grad = torch.randn_like(whole)
    (streamed,) = torch.autograd.grad(torch.cat(outputs, 1), x, grad)
    (at_once,) = torch.autograd.grad(whole, x, grad)
    assert norm_error(streamed, at_once.cpu()) < 1e-11


def test_a_forked_stream(device):
    """One prompt, two continuations: the state of the prompt serves both and stays as it was."""
    layer, x = build("power-heads", device), torch.randn(3, 2, 4, DIM, device=device)
    with torch.no_grad():
        _, prompt = layer(x[0], return_state=True)
        kept = prompt.clone()
        for other in x[1:]:
            y = layer(other, state=prompt)
            whole = layer(torch.cat([x[0], other], dim=1), frames=4)[:, 4:]
            torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(prompt.total, kept.total) and torch.equal(prompt.count, kept.count)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("product-default", "power-2d-heads"))
def test_half_precision(name, dtype, device):
    layer = build(name, device, dtype)
    x = torch.randn(2, TOKENS, DIM, device=device, dtype=dtype)
    positions = positions_of(layer, TOKENS, device)
    y, state = layer(x, return_state=True, **positions)
    y.sum().backward()
    assert y.dtype == dtype and state.total.dtype == torch.float32
    exact = copy.deepcopy(layer).double()(x.double(), **positions)
    assert norm_error(y.detach(), exact.detach().cpu()) < 8 * torch.finfo(dtype).eps
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ("product-default", "power-2d-heads"))
def test_autocast(name, device):
    """The projections run in bfloat16, parameters and their gradients and the state stay in float32."""
    layer, x = build(name, device), torch.randn(2, TOKENS, DIM, device=device)
    positions = positions_of(layer, TOKENS, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, state = layer(x, return_state=True, **positions)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and state.total.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    assert norm_error(y.detach(), layer(x, **positions).detach().double().cpu()) < 0.03


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_round_trip(name, device):
    layer, other = build(name, device), build(name, device)
    x = torch.randn(2, TOKENS, DIM, device=device)
    positions = positions_of(layer, TOKENS, device)
    assert not torch.equal(layer(x, **positions), other(x, **positions))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, **positions), other(x, **positions))


def test_copies(device):
    """deepcopy, and torch.save of the whole module."""
    layer, x = build("power-groups-heads", device), torch.randn(2, TOKENS, DIM, device=device)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    y = layer(x)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.coeff.add_(1)
        assert not torch.equal(other(x), y) and torch.equal(layer(x), y)


def test_a_strided_batch(device):
    """Tokens of a channels-first image, as convolutions leave them."""
    layer = build("product-default", device, torch.float64)
    image = torch.randn(2, DIM, 3, 3, device=device, dtype=torch.float64)
    tokens = image.flatten(2).mT
    assert not tokens.is_contiguous()
    torch.testing.assert_close(layer(tokens), layer(tokens.contiguous()), rtol=1e-12, atol=1e-14)


def test_training_reduces_the_loss(device):
    """A task that needs the context: tell every token the mean of the sequence."""
    layer = PoM(8, 2, 2, form="power", n_sel_heads=4).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        x = torch.randn(16, 10, 8, device=device)
        loss = F.mse_loss(layer(x), x.mean(dim=1, keepdim=True).expand_as(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
