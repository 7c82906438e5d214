"""The layer's own ways with its projections: in blocks, folded, stored or made again. All are the same function."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import FLOOR, norm_error, twice_differentiable_gate
from torch.utils._python_dispatch import TorchDispatchMode

from pom_ext import PoM, polynomial_state
from pom_ext.layers import pom as module
from pom_ext.ops import _projections, reference
from pom_ext.ops.projected import folded_readout, folding_pays

LAYERS = {
    "power-heads": {"form": "power", "degree": 3, "n_sel_heads": 4},
    "power-heads-bias-2d": {"form": "power", "n_sel_heads": 8, "bias": True, "rope": "2d"},
    "power": {"form": "power", "degree": 3, "rope": "1d"},
    "product": {"degree": 3},
    "product-heads": {"degree": 2, "n_sel_heads": 4, "bias": False},
}
TOKENS, DIM = 70, 16
CONTEXTS = {
    "whole": {},
    "weight": {"weight": torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0))},
    "frames": {"frames": 10},
    "frames_unequal": {"frames": [0, 3, 3, 40, TOKENS]},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 0, 5, 64, TOKENS])},
    "many sequences": {"cu_seqlens": torch.arange(TOKENS + 1)},  # so many that folding does not pay
    "frames+weight": {"frames": 14, "weight": torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1))},
}
MEMORY = ("store", "recompute")


def build(name, dim=DIM, dtype=torch.float32, **options):
    return PoM(dim, **LAYERS[name], **options).to(dtype)


def positions_of(layer, tokens):
    if layer.rope != "2d":
        return {}
    return {"positions": torch.stack([torch.arange(tokens) // 8, torch.arange(tokens) % 8], -1)}


def definition(layer, x, context, dtype):
    """The layer in plain torch in one dtype, as a function of x and its parameters."""
    weights = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
    x = x.detach().to(dtype).requires_grad_()
    project = lambda name, t: F.linear(t, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    positions = positions_of(layer, x.shape[1]).get("positions")
    tables = [
        t and t._replace(cos=t.cos.to(dtype), sin=t.sin.to(dtype)) for t in layer._rotaries(x, x, positions, None)
    ]
    modes = {name: value.to(dtype) if name == "weight" else value for name, value in context.items()}
    if isinstance(modes.get("frames"), int):
        modes["frames"] = range(0, x.shape[1] + 1, modes["frames"])
    mixed = reference.mix(
        project("context_proj", x), project("gate_proj", x), weights.get("coeff"), form=layer.form, degree=layer.degree,
        n_sel_heads=layer.n_sel_heads, rotary=tables[0], gate_rotary=tables[1], **modes,
    )  # fmt: skip
    return project("out_proj", mixed), x, weights


def with_gradients(y, x, weights, grad):
    grads = torch.autograd.grad(y, [x, *weights.values()], grad.to(y.dtype))
    return {"y": y.detach(), "grad x": grads[0], **{f"grad {name}": g for name, g in zip(weights, grads[1:])}}


def check(layer, x, context, dtype):
    """Outputs and gradients at most twice as far from the float64 definition as plain torch, plus a rounding floor."""
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    grad = (1 + torch.randn(x.shape)) / x.shape[1]
    y = layer(x, **context, **positions_of(layer, x.shape[1]))
    with torch.no_grad():
        unrecorded = layer(x, **context, **positions_of(layer, x.shape[1]))
    results = with_gradients(y, x, dict(layer.named_parameters()), grad) | {"y without gradients": unrecorded}
    exact, plain = (with_gradients(*definition(layer, x, context, d), grad) for d in (torch.float64, dtype))
    for name, result in results.items():
        of = name.removesuffix(" without gradients")
        assert result.dtype == dtype and result.shape == exact[of].shape, name
        error, bound = norm_error(result, exact[of]), 2 * norm_error(plain[of], exact[of]) + FLOOR[dtype]
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


@pytest.fixture(params=(None, True, False), ids=("as it pays", "folded", "direct"))
def folding(request, monkeypatch):
    """Which way a readout with heads takes."""
    if request.param is not None:
        monkeypatch.setattr(
            module, "folding_pays", lambda x, groups, channels, heads, even: request.param and heads > 1
        )


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, context, memory, folding):
    check(build(name, memory=memory), torch.randn(2, TOKENS, DIM), CONTEXTS[context], torch.float32)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name, dtype, folding):
    for memory in MEMORY:
        check(build(name, memory=memory), torch.randn(2, TOKENS, DIM), CONTEXTS["frames_unequal"], dtype)


@pytest.mark.parametrize("batch, tokens", [(1, 3000), (3, 1500), (70, 33), (2, 1), (0, 5)])
@pytest.mark.parametrize("context", ("whole", "weight", "frames", "frames_unequal"))
@pytest.mark.parametrize("name", ("power-heads", "product"))
def test_blocks(name, context, batch, tokens):
    """More tokens than a block holds, samples that share one, and frames across their borders."""
    contexts = {
        "whole": {},
        "weight": {"weight": torch.rand(batch, tokens)},
        "frames": {"frames": tokens // 3 if tokens % 3 == 0 else 1},
        "frames_unequal": {"frames": [0, tokens // 7, tokens // 7, tokens - tokens // 5, tokens]},
    }
    if batch and not (context == "frames" and contexts["frames"]["frames"] == 1 and tokens > 1):
        check(build(name, 8, memory="recompute"), torch.randn(batch, tokens, 8), contexts[context], torch.float32)
        return
    with torch.no_grad():
        assert build(name, 8)(torch.randn(batch, tokens, 8), **contexts[context]).shape == (batch, tokens, 8)


@pytest.mark.parametrize("name", LAYERS)
def test_long_sequences(name):
    layer, x = build(name, 8), torch.randn(1, 20_077, 8)
    positions = positions_of(layer, x.shape[1])
    recorded = layer(x, **positions)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, **positions), recorded.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", MEMORY)
def test_other_queries_and_states_from_before(memory):
    for name in LAYERS:
        layer = build(name, memory=memory, dtype=torch.float64)
        x, context = torch.randn(2, TOKENS, 5, DIM, dtype=torch.float64).unbind(2)[:2]
        options = positions_of(layer, TOKENS)
        across = {"context_positions": options["positions"], **options} if options else {}
        y = layer(x, context, **across)
        hooked = copy.deepcopy(layer)
        for projection in (hooked.context_proj, hooked.gate_proj, hooked.out_proj):
            projection.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(y, hooked(x, context, **across))
        both = torch.cat([x, context], dim=1)
        if not options and layer.rope is None:
            whole, end = layer(both, return_state=True)
            _, state = layer(x, return_state=True)
            part, after = layer(context, state=state, return_state=True)
            torch.testing.assert_close(part, whole[:, TOKENS:])
            torch.testing.assert_close(after.total, end.total)
            assert torch.equal(after.count, end.count)


def directional(layer, x, context):
    """x and the parameters as one function of tensors, for derivatives."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,), context)

    return function, (x, *(p.detach() for p in layer.parameters()))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("context", ("whole", "frames_unequal"))
@pytest.mark.parametrize("name", ("power-heads", "power", "product"))
def test_derivatives(name, context, memory, folding):
    layer = build(name, 4 if name == "product" else 8, dtype=torch.float64, memory=memory)
    contexts = {"whole": {}, "frames_unequal": {"frames": [0, 2, 2, 5]}}
    function, given = directional(layer, torch.randn(2, 5, layer.dim, dtype=torch.float64), contexts[context])
    leaves = [t.requires_grad_() for t in given]
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", LAYERS)
def test_function_transforms(name, memory, folding):
    layer = build(name, dtype=torch.float64, memory=memory)
    function, given = directional(layer, torch.randn(2, 6, DIM, dtype=torch.float64), positions_of(layer, 6))
    loss = lambda *values: function(*values).square().sum()
    argnums = tuple(range(len(given)))
    grads = torch.func.grad(loss, argnums)(*given)
    leaves = [t.clone().requires_grad_() for t in given]
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*leaves), leaves))

    many = [torch.stack([t, 1.1 * t, t - 0.1]) for t in given]
    each = [torch.func.grad(loss, argnums)(*values) for values in zip(*many)]
    for dims in (0, (0, *(None,) * (len(given) - 1))):
        values = many if dims == 0 else [many[0], *given[1:]]
        found = torch.func.vmap(torch.func.grad(loss, argnums), dims)(*values)
        if dims == 0:
            torch.testing.assert_close(found, tuple(torch.stack(ts) for ts in zip(*each)))
    y, tangent = torch.func.jvp(function, given, given)
    step = 1e-6
    ahead, behind = (function(*(t * (1 + s) for t in given)) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(function(*given), y)


class Largest(TorchDispatchMode):
    """The most numbers that a result of the layer's operations has."""

    numbers, names = 0, ()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        self.names += (operation.__name__,)
        for t in results if isinstance(results, tuple) else (results,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return results


def along(y, x, direction):
    """The derivative along a direction of x by reverse mode alone: the gradients are linear in what comes back."""
    back = torch.zeros_like(y, requires_grad=True)
    (grad,) = torch.autograd.grad(y, x, back, create_graph=True)
    return torch.autograd.grad(grad, back, direction.to(y.dtype))[0]


def check_along(layer, x, context, dtype):
    """Value and tangent without gradients, each by the operation for both; errors as in `check`."""
    layer, x = layer.to(dtype), x.to(dtype)
    direction = (torch.randn(x.shape) / 8).to(dtype)
    with torch.no_grad(), Largest() as called:
        results = torch.func.jvp(lambda x: layer(x, **context, **positions_of(layer, x.shape[1])), (x,), (direction,))
    assert sum("_along" in name for name in called.names) == 2 and "pom_ext.readout" not in str(called.names)

    def by_definition(dtype):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "gate_value", twice_differentiable_gate)
            y, at, _ = definition(layer, x, context, dtype)
        return y.detach(), along(y, at, direction)

    exact, plain = by_definition(torch.float64), by_definition(dtype)
    for name, result, expected, other in zip(("y", "tangent"), results, exact, plain):
        assert result.dtype == dtype and result.shape == expected.shape, name
        error, bound = norm_error(result, expected), 2 * norm_error(other, expected) + FLOOR[dtype]
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", LAYERS)
def test_along_a_direction(name, context, folding):
    check_along(build(name), torch.randn(2, TOKENS, DIM), CONTEXTS[context], torch.float32)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_along_a_direction_in_other_dtypes(name, dtype, folding):
    check_along(build(name), torch.randn(2, TOKENS, DIM), CONTEXTS["frames_unequal"], dtype)


@pytest.mark.parametrize("batch, tokens", [(1, 3000), (3, 1500), (70, 33), (2, 1)])
@pytest.mark.parametrize("name", ("power-heads", "product"))
def test_along_a_direction_in_blocks(name, batch, tokens):
    for context in ({}, {"frames": [0, tokens // 7, tokens // 7, tokens]}):
        check_along(build(name, 8), torch.randn(batch, tokens, 8), context, torch.float32)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("name", LAYERS)
def test_along_a_direction_of_nothing(name, shape, folding):
    layer, x = build(name).requires_grad_(False), torch.randn(*shape, DIM)
    for result in torch.func.jvp(lambda x: layer(x, **positions_of(layer, shape[1])), (x,), (x,)):
        assert result.shape == x.shape


@pytest.mark.parametrize("moving", ("x", "context", "both", "both and a gate"))
@pytest.mark.parametrize("name", LAYERS)
def test_what_moves(name, moving, folding):
    """Queries, what they read, or a weight too: the same derivative as by a layer whose projections are called."""
    layer = build(name, dtype=torch.float64).requires_grad_(False)
    hooked = copy.deepcopy(layer)
    for projection in (hooked.context_proj, hooked.gate_proj, hooked.out_proj):
        projection.register_forward_hook(lambda *_: None)
    x, context = torch.randn(2, 2, TOKENS, DIM, dtype=torch.float64).unbind()
    given = {"x": x, "context": context, "gate": layer.gate_proj.weight}
    chosen = [n for n in given if n in moving or (moving.startswith("both") and n != "gate")]
    across = positions_of(layer, TOKENS)
    across |= {"context_positions": across["positions"]} if across else {}

    def tangents(layer):
        def function(*moved):
            at = given | dict(zip(chosen, moved))
            weights = {"gate_proj.weight": at["gate"]}
            return torch.func.functional_call(layer, weights, (at["x"], at["context"]), across)

        return torch.func.jvp(function, tuple(given[n] for n in chosen), tuple(given[n].flip(0) for n in chosen))

    torch.testing.assert_close(tangents(layer), tangents(hooked))


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_a_direction(name, folding):
    """vmap, gradients and a compiled graph of what has no gradient by itself; the gradient of a gradient, along it."""
    layer = build(name, dtype=torch.float64).requires_grad_(False)
    x, *directions = torch.randn(4, 2, 6, DIM, dtype=torch.float64).unbind()
    function = lambda x: layer(x, **positions_of(layer, 6))
    tangent = lambda x, direction: torch.func.jvp(function, (x,), (direction,))[1]
    one_by_one = torch.stack([tangent(x, direction) for direction in directions])
    torch.testing.assert_close(torch.func.vmap(tangent, (None, 0))(x, torch.stack(directions)), one_by_one)
    at_each = torch.stack([tangent(direction, direction) for direction in directions])
    torch.testing.assert_close(torch.func.vmap(tangent)(*[torch.stack(directions)] * 2), at_each)
    torch._dynamo.reset()
    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, directions[0]), one_by_one[0])

    weights = torch.randn_like(x)
    scalar = lambda x: (weights * function(x)).sum()
    over_forward = torch.func.grad(lambda x: (weights * tangent(x, directions[0])).sum())(x)
    over_reverse = torch.func.jvp(torch.func.grad(scalar), (x,), (directions[0],))[1]
    torch.testing.assert_close(over_forward, over_reverse)
    x = x.clone().requires_grad_()
    twice = torch.autograd.grad((weights * tangent(x, directions[0])).sum(), x)[0]
    torch.testing.assert_close(twice, over_forward)


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("name", ("project_readout_along", "folded_readout_along"))
def test_operations_along_directions(name, groups):
    """By themselves: differentiable once more backward in everything, the directions too; and in batches."""
    heads = 2
    double = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    x, total, weights = (2, 4, 3), (2, groups, 4), [(heads, 3), (heads,), (3, 4), (3,)]
    leaves = [double(*shape) for shape in (x, total, total, x, total, total, *weights)]
    count = 1 + torch.rand(2, groups, dtype=torch.float64)
    rest = None, None, None, 0, 1, *([heads] if name.startswith("project") else [])
    operation = getattr(torch.ops.pom_ext, name)

    def function(x_tangent, total_tangent, residual_tangent, x, total, residual, gate_weight, gate_bias, *out):
        given = x_tangent, total_tangent, residual_tangent, x, gate_weight, gate_bias, total, residual
        return operation(*given, count, *out, *rest)

    torch.autograd.gradcheck(function, leaves, fast_mode=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.func.jvp(function, tuple(leaves), tuple(leaves))
    many = [torch.stack([t.detach(), t.detach() + 0.1]) for t in leaves]
    one_by_one = [torch.stack(results) for results in zip(*(function(*values) for values in zip(*many)))]
    torch.testing.assert_close(list(torch.func.vmap(function)(*many)), one_by_one)
    with torch.no_grad():
        unrecorded = function(*leaves)
    torch.testing.assert_close(unrecorded, function(*leaves))  # by parts


@pytest.mark.parametrize("name", ("power-heads", "product"))
def test_projections_are_not_stored(name):
    """Nothing as large as the tokens times the state's width, forward or back, unless gradients keep it."""
    x = torch.randn(1, 2000, DIM, requires_grad=True)
    for memory in MEMORY:
        layer = build(name, memory=memory)
        with torch.no_grad(), Largest() as inferred:
            layer(x)
        with Largest() as recorded:
            layer(x)
        assert inferred.numbers <= x.numel()
        assert (recorded.numbers <= x.numel()) == (memory == "recompute")


def test_frozen_weights_get_no_gradient_computed():
    layer, x = build("power", memory="recompute"), torch.randn(1, 20, DIM, requires_grad=True)
    layer.context_proj.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.context_proj.weight.grad is None and x.grad is not None
    layer.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.context_proj.weight.grad is not None


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", LAYERS)
def test_runs_and_threads_change_no_bit(name, memory):
    layer, x = build(name, memory=memory), torch.randn(3, 500, DIM)
    positions, threads, results = positions_of(layer, 500), torch.get_num_threads(), []
    try:
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            y = layer(x, **positions)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_when_folding_pays():
    x = torch.empty(1, 64, 512)
    assert folding_pays(x, 1, 1024, 8) and folding_pays(x, 4, 1024, 8) and folding_pays(x, 4, 1024, 8, even=False)
    assert not folding_pays(x, 1, 1024, 1)
    assert not folding_pays(x, 64, 1024, 8, even=False)
    assert not folding_pays(x[:, :1], 1, 1024, 8)


def test_when_folding_pays_on_a_gpu():
    """With gradients from as many queries of all samples on as its small kernels take; without, of a group."""
    pays = lambda batch, tokens, groups=1: folding_pays(
        SimpleNamespace(device=torch.device("cuda"), shape=(batch, tokens, 512)), groups, 1024, 8
    )
    assert pays(2, 2048) and pays(1, 4096, 64) and not pays(1, 4095) and not pays(2, 2047)
    with torch.no_grad():
        assert pays(1, 128) and pays(1, 1280, 10) and not pays(8, 127) and not pays(1, 1279, 10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("recorded", (False, True), ids=("no gradients", "gradients"))
def test_a_group_of_no_weight_reads_the_bias_alone(recorded, dtype, device):
    """Though its tokens, which count nothing, are infinite: then the sum of the group is not a number."""
    u, weight = torch.randn(2, 60, 64, dtype=dtype, device=device), torch.ones(2, 60, device=device)
    u[1, 40:, ::3], weight[1, 40:] = float("inf"), 0
    state = polynomial_state(u, form="product", degree=1, weight=weight, cu_seqlens=[0, 20, 40, 60])
    assert state.total[1, 2].isnan().any() and state.count[1, 2] == 0
    gates, out = torch.nn.Linear(32, 4).to(device, dtype), torch.nn.Linear(64, 24).to(device, dtype)
    x = torch.randn(2, 60, 32, dtype=dtype, device=device, requires_grad=True)
    with torch.set_grad_enabled(recorded):
        y = folded_readout(x, gates, out, state, form="product", n_sel_heads=4, frames=20)
        folded = _projections.fold(state.total, state.residual, state.count, out.weight, 4)
    assert torch.equal(y[1, 40:], out.bias.expand(20, -1)) and y.isfinite().all()
    assert not folded[1, 2].any() and folded.isfinite().all()
    if recorded:
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert not grad[1, 40:].any() and grad.isfinite().all()


def test_dtypes_that_do_not_go_together():
    layer = build("power-heads")
    with pytest.raises(TypeError, match="x: expected torch.float32 .*, got torch.float64"):
        layer(torch.randn(1, 3, DIM, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, state = layer(torch.randn(1, 30, DIM), return_state=True)
    assert y.dtype == torch.bfloat16 and state.total.dtype == torch.float32
