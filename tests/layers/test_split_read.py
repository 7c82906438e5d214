"""read="split": values and derivatives against the formulas, states in chunks, compiled and in half precision."""

import copy

import pytest
import torch
from cases import FLOOR, norm_error, twice_differentiable_gate
from layer_cases import DIM, LAYERS, TOKENS, positions_of
from split_cases import definition, features

from pom_ext import PoM, State, forward_mode

FADES = (None, "head", "gated")
WEIGHT = torch.tensor([[1.0] * TOKENS, [1, 2, 0, 0.5, 0, 0, 1, 1, 0]], dtype=torch.float64)
UNEVEN = [0, 2, 2, 3, TOKENS]
MODES = {
    "whole": ({}, [TOKENS]),
    "frames": ({"frames": 3}, [3, 3, 3]),
    "uneven": ({"frames": UNEVEN}, [2, 0, 1, 6]),
    "causal": ({"causal": True}, [1] * TOKENS),
}
MODE = pytest.mark.parametrize("mode", MODES)
FADE = pytest.mark.parametrize("fade", FADES)


def build(name, fade, dtype=torch.float64, dim=DIM):
    """A layer whose gates and fades of the past depend on the token."""
    layer = PoM(dim, **LAYERS[name], read="split", fade=fade).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if "past" in parameter_name or "fade" in parameter_name:
                parameter += 0.5 * torch.randn_like(parameter)
    return layer


def grads(outputs, inputs, seeds):
    found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


@FADE
@MODE
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_formulas(name, weighted, mode, fade):
    """Also of the state before and after."""
    options, sizes = MODES[mode]
    layer = build(name, fade)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    weight = WEIGHT if weighted else None
    positions = positions_of(layer, TOKENS, "cpu")
    rates = layer.gate_proj.out_features if fade else 1
    before = torch.randn(2, layer.state_width, dtype=torch.float64, requires_grad=True)
    count = (1 + torch.rand(2, rates, dtype=torch.float64)).requires_grad_()
    held = count[:, None] if fade else count
    state = State(before[:, None], torch.zeros_like(before[:, None]), held)
    y, after = layer(x, weight=weight, state=state, return_state=True, **options, **positions)
    wide = count.expand(-1, layer.gate_proj.out_features)
    exact, total, left = definition(layer, x, sizes, weight, positions.get("positions"), before, wide)
    left = left[:, None] if fade else left[:, :1]
    found, expected = [y, after.total[:, 0], after.count], [exact, total, left]
    inputs = [x, before, count, *layer.parameters()]
    seeds = [torch.randn_like(t) for t in expected]
    found += grads(found, inputs, seeds)
    expected += grads(expected, inputs, seeds)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert norm_error(a.detach(), b.detach()) < 1e-11, number


@FADE
@MODE
@pytest.mark.parametrize("name", ["product-default", "power-heads"])
def test_at_the_first_frame_the_past_is_zero(name, mode, fade):
    layer, (options, sizes) = build(name, fade), MODES[mode]
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    first = x[:, : sizes[0]]
    alone = layer.out_proj(
        twice_differentiable_gate(layer.gate_proj(first), form=layer.form).repeat_interleave(
            layer.state_width // layer.gate_proj.out_features, dim=-1
        )
        * features(layer, first).mean(1, keepdim=True)
    )
    torch.testing.assert_close(layer(x, **options)[:, : sizes[0]], alone, rtol=1e-11, atol=1e-12)


@FADE
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", ["frames", "uneven", "causal"])
def test_every_cut_gives_the_same(name, mode, fade):
    options, sizes = MODES[mode]
    layer, x = build(name, fade), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    positions = positions_of(layer, TOKENS, "cpu").get("positions")
    whole, last = layer(x, positions=positions, return_state=True, **options)
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()

    def run(now, first, end, state):
        part = {"frames": [e - ends[first] for e in ends[first : end + 1]]} if mode == "uneven" else options
        at = None if positions is None else positions[now]
        return layer(x[:, now], positions=at, state=state, return_state=True, **part)

    for cut in range(len(sizes) + 1):
        if mode == "uneven" and cut in (0, len(sizes)):
            continue  # [0] as offsets is a frame without tokens, not no frame
        head, state = run(slice(0, ends[cut]), 0, cut, None)
        tail, state = run(slice(ends[cut], None), cut, len(sizes), state)
        torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state.state_dict(), last.state_dict(), rtol=1e-11, atol=1e-12)
    one_by_one, state = [], None
    for start, end in zip(ends, ends[1:], strict=False):  # a whole context is one frame
        at = None if positions is None else positions[start:end]
        y, state = layer(x[:, start:end], positions=at, state=state, return_state=True)
        one_by_one.append(y)
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.state_dict(), last.state_dict(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fade", ["head", "gated"])
def test_states_of_chunks_follow_one_another(fade):
    """`State.then` of what chunks sum alone is what a stream keeps."""
    layer, x = build("power-heads", fade), torch.randn(2, 4, 3, DIM, dtype=torch.float64)
    _, expected = layer(x.flatten(1, 2), frames=3, return_state=True)
    found = layer.state_of(x[:, 0])
    for frame in x[:, 1:].unbind(1):
        found = found.then(layer.state_of(frame), layer.fade_of(frame, 1))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-13)


@FADE
def test_queries_of_another_context(fade):
    layer, x = build("power-heads", fade), torch.randn(2, 5, DIM, dtype=torch.float64)
    context, earlier = torch.randn(2, 2, TOKENS, DIM, dtype=torch.float64)
    _, state = layer(earlier, return_state=True)
    both, _, _ = definition(layer, torch.cat([earlier, context], dim=1), [TOKENS, TOKENS])
    assert norm_error(layer(context, state=state).detach(), both[:, TOKENS:].detach()) < 1e-11
    cross = layer(x, context, state=state)
    same = layer(torch.cat([context[:, :4], context[:, :1]], dim=1), context, state=state)
    torch.testing.assert_close(same[:, :4], layer(context, state=state)[:, :4], rtol=1e-11, atol=1e-12)
    assert cross.shape == x.shape and not torch.allclose(cross, same)


# Derivatives


@FADE
@pytest.mark.parametrize("mode", ["frames", "uneven", "causal"])
@pytest.mark.parametrize("name", ["product-default", "power-heads", "power-default"])
def test_gradcheck_twice(name, mode, fade):
    """Of the tokens and of all parameters of gates and fades, by finite differences; and of their gradients."""
    options = {"frames": {"frames": 2}, "uneven": {"frames": [0, 1, 1, 4]}, "causal": {"causal": True}}[mode]
    layer = build(name, fade, dim=4)
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters() if "gate" in n or "fade" in n]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x, options)

    inputs = (x, *(layer.get_parameter(n).detach().clone().requires_grad_() for n in names))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@FADE
@MODE
@pytest.mark.parametrize("name", ["product-default", "power-heads", "power-2d-heads"])
@pytest.mark.parametrize("jvp", [torch.func.jvp, forward_mode.jvp], ids=["torch", "forward_mode"])
def test_along_a_direction_of_tokens_and_parameters(jvp, name, mode, fade):
    layer, (options, sizes) = build(name, fade), MODES[mode]
    options = options | positions_of(layer, TOKENS, "cpu")
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    direction = torch.randn_like(x)

    def run(x, parameters):
        return torch.func.functional_call(layer, parameters, x, options)

    y, tangent = jvp(run, (x, parameters), (direction, directions))
    exact, _, _ = definition(layer, x.requires_grad_(), sizes, positions=options.get("positions"))
    seed = torch.randn_like(exact)
    inputs = [x, *layer.parameters()]
    expected = sum(
        (g * d).sum() for g, d in zip(grads(exact, inputs, seed), [direction, *directions.values()], strict=True)
    )
    assert norm_error(y.detach(), exact.detach()) < 1e-11
    torch.testing.assert_close((tangent * seed).sum(), expected, rtol=1e-9, atol=1e-10)


@FADE
@MODE
@pytest.mark.parametrize("name", ["product-default", "power-heads"])
def test_compiled_whole(name, mode, fade):
    layer, options = build(name, fade, torch.float32), dict(MODES[mode][0])
    if "uneven" in mode:
        options["frames"] = torch.tensor(UNEVEN)
    torch.compiler.reset()  # forgets the layers before, which would count as new sizes of this one
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, TOKENS, DIM, requires_grad=True)
    _, state = layer(torch.randn(2, TOKENS, DIM), return_state=True)
    state = state.detach()
    results = []
    for run in (layer, compiled):
        y, after = run(x, weight=WEIGHT.float(), state=state, return_state=True, **options)
        results.append([y, after.total, after.count, *grads(y, [x, *layer.parameters()], torch.ones_like(y))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


# Half precision


@FADE
@MODE
@pytest.mark.parametrize("name", ["product-default", "power-heads", "power-2d-heads"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_is_as_good_as_plain_torch(autocast, name, mode, fade):
    """The output and the gradients of tokens, gates and fades, by the rule of `cases.assert_accurate`."""
    options, sizes = MODES[mode]
    low = build(name, fade, torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(2, TOKENS, DIM, dtype=low.gate_proj.weight.dtype)
    positions = positions_of(low, TOKENS, "cpu")
    high = copy.deepcopy(low).double()
    seed = torch.randn(2, TOKENS, DIM, dtype=torch.float64)

    def results(layer, run, dtype):
        tokens = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y = run(layer, tokens)
        names = [n for n, _ in layer.named_parameters() if "gate" in n or "fade" in n]
        found = grads(y, [tokens, *(layer.get_parameter(n) for n in names)], seed.to(y.dtype))
        return {"y": y.detach(), **dict(zip(["x", *names], found, strict=True))}

    def plain(layer, tokens):
        return definition(layer, tokens, sizes, positions=positions.get("positions"))[0]

    found = results(low, lambda layer, tokens: layer(tokens, **options, **positions), x.dtype)
    exact, rounded = results(high, plain, torch.float64), results(low, plain, x.dtype)
    assert found["y"].dtype == torch.bfloat16
    for key, value in found.items():
        bound = 2 * norm_error(rounded[key].double(), exact[key]) + FLOOR[torch.bfloat16]
        assert norm_error(value, exact[key]) <= bound, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fades_near_one_are_not_rounded(dtype):
    """A past of a thousand frames, in bfloat16 too: the fade of 0.9999 would round to 1."""
    layer = PoM(8, form="power", n_sel_heads=2, read="split", fade="head").to(dtype)
    with torch.no_grad():
        layer.fade_logit.copy_(torch.tensor([9.25, 6.0]))  # held exactly by bfloat16
    fade = layer.fade_of(torch.zeros(1, 1, 8, dtype=dtype), 1)
    torch.testing.assert_close(fade, torch.tensor([9.25, 6.0], dtype=torch.float64).sigmoid().float())


# Emptiness, padding, and what is wrong


@FADE
def test_no_tokens_change_nothing(fade):
    layer = build("power-heads", fade)
    _, state = layer(torch.randn(2, TOKENS, DIM, dtype=torch.float64), return_state=True)
    none = torch.zeros(2, 0, DIM, dtype=torch.float64)
    for options in ({"causal": True}, {"frames": 3}):
        y, after = layer(none, state=state, return_state=True, **options)
        assert y.shape == none.shape
        torch.testing.assert_close(after.state_dict(), state.state_dict(), rtol=0, atol=0)
    y, after = layer(none, return_state=True)
    assert y.shape == none.shape and after.mean().eq(0).all()
    assert layer(none[:0], return_state=True)[0].shape == (0, 0, DIM)


@FADE
@pytest.mark.parametrize("options", [{}, {"frames": 3}, {"frames": UNEVEN}], ids=str)
def test_padding_is_not_there(options, fade):
    """Tokens of weight 0 change neither a mean nor a fade."""
    layer, x = build("power-heads", fade), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    weight = torch.ones(2, TOKENS, dtype=torch.float64)
    weight[:, 2], weight[1, 4:7] = 0, 0
    other = torch.where(weight[..., None] > 0, x, 99)
    (y, state), (z, after) = (layer(t, weight=weight, return_state=True, **options) for t in (x, other))
    kept = weight > 0
    assert torch.equal(y[kept], z[kept]) and torch.equal(state.total, after.total)
    assert torch.equal(state.count, after.count) and y.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"read": "both"}, "read: expected 'shared' or 'split', got 'both'"),
        ({"read": True}, "read: expected 'shared' or 'split', got True"),
        ({"fade": "head"}, "fade: expected None, or with read='split' also 'head' or 'gated', got 'head' and 'shared'"),
        ({"read": "split", "fade": "slow"}, "fade: expected None, .* got 'slow' and 'split'"),
        ({"read": "split", "fade": True}, "fade: expected None, .* got True and 'split'"),
        ({"read": "split", "fade": 0.5}, "fade: expected None, .* got 0.5 and 'split'"),
    ],
)
def test_layers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        PoM(8, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"mask": torch.ones(2, 4, 4)}, ValueError, "mask, cu_seqlens: read='split' takes frames, causal or neither"),
        ({"cu_seqlens": [0, 4]}, ValueError, "mask, cu_seqlens: read='split' takes frames"),
        ({"frames": 2, "causal": True}, ValueError, "frames and causal|causal and frames"),
        ({"frames": 3}, ValueError, "frames: expected a frame length that divides the 4 context tokens, got 3"),
        ({"state": torch.zeros(2)}, TypeError, "state: expected a State, got Tensor"),
        ({"state": State.empty(2, 32)}, ValueError, r"state.total: expected \(2, 1, 16\) .* got \(2, 1, 32\)"),
        ({"state": State.empty(2, 16)}, ValueError, r"state.count: expected \(2, 1, 4\) .* got \(2, 1\)"),
        ({"state": State.empty(3, 16)}, ValueError, r"state.total: expected \(2, 1, 16\) .* got \(3, 1, 16\)"),
        ({"state": State.empty(2, 16, dtype=torch.float64)}, ValueError, "in torch.float32 .* got .* in torch.float64"),
        ({"state": State.empty(2, 16, device="meta").fading(4)}, ValueError, "on cpu, .* got .* on meta"),
    ],
)
def test_calls_that_cannot_be(options, error, message):
    layer = PoM(8, form="power", n_sel_heads=4, read="split", fade="head")
    with pytest.raises(error, match=message):
        layer(torch.zeros(2, 4, 8), **options)


def test_a_shared_read_refuses_a_state_that_fades():
    layer, state = PoM(8, form="power", n_sel_heads=4), State.empty(2, 16).fading(4)
    with pytest.raises(ValueError, match=r"state.*count"):
        layer(torch.zeros(2, 4, 8), state=state)


def test_a_new_layer_reads_half_of_a_past_that_fades_from_fast_to_slow():
    layer = PoM(8, form="power", n_sel_heads=4, read="split", fade="gated")
    assert not layer.past_gate_proj.weight.any() and not layer.past_gate_proj.bias.any()
    fade = layer.fade_of(torch.randn(2, 6, 8), 3)
    assert fade.shape == (2, 3, 4) and torch.equal(fade[0, 0], fade[1, 2])
    torch.testing.assert_close(fade[0, 0], torch.linspace(0, 4, 4).sigmoid())
    assert "read='split', fade='gated'" in repr(layer)
