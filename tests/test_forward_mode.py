"""The derivative of whole models in a direction: torch's own, with fewer products and passes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import norm_error
from torch.nn.functional import conv2d, layer_norm, linear
from torch.utils._python_dispatch import TorchDispatchMode

from pom_ext import PoM
from pom_ext.forward_mode import jvp
from pom_ext.layers.blocks import AdaLN
from pom_ext.models import ImageDiT

PRODUCTS = {  # of matrices, by operation
    **dict.fromkeys((torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default), 1),
    torch.ops.pom_ext.linear.default: 1,
    torch.ops.pom_ext.project_state.default: 1,
    torch.ops.pom_ext.project_readout.default: 2,
}


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        names = [argument.name for argument in operation._schema.arguments]
        tangent = "x_tangent" in names and args[names.index("x_tangent")] is not None
        self.count += PRODUCTS.get(operation, 0) * (2 if tangent else 1)
        return operation(*args, **(kwargs or {}))


def products(call):
    with CountProducts() as counted:
        call()
    return counted.count


def image_model(mixer, n_layers=2):
    model = ImageDiT(3, 5, 8, patch=2, dim=16, n_layers=n_layers, n_heads=2, mixer=mixer).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    labels = torch.tensor([1, 4])
    at = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([10.0, 700.0], dtype=torch.float64)
    direction = torch.randn_like(at[0]), torch.tensor([1.0, -30.0], dtype=torch.float64)
    return lambda images, time: model(images, time, labels), model, at, direction


def plain_layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(shape), 0))
    centered = x - x.mean(axes, keepdim=True)
    y = centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("mixer", ("power", "product"))
def test_a_model_along_a_direction(mixer, monkeypatch):
    function, model, at, direction = image_model(mixer)
    value, tangent = jvp(function, at, direction)
    torch.testing.assert_close((value, tangent), torch.func.jvp(function, at, direction))
    step = 1e-6
    ahead, behind = (function(*(x + s * d for x, d in zip(at, direction))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)

    def gradient(jvp):
        value, tangent = jvp(function, at, direction)
        return torch.autograd.grad((value * tangent).sum(), model.parameters(), materialize_grads=True)

    found = gradient(jvp)
    monkeypatch.setattr(F, "layer_norm", plain_layer_norm)  # gradients of torch's own tangent of it are wrong
    torch.testing.assert_close(found, gradient(torch.func.jvp))


def test_two_products_for_one():
    layer, x = PoM(16, 3), torch.randn(2, 5, 16)
    feed_forward = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            for module, count in ((layer, 3), (feed_forward, 2)):
                assert products(lambda module=module: module(x)) == count
                assert products(lambda module=module: jvp(module, (x,), (x,))) == 2 * count
    by_torch = products(lambda: torch.func.jvp(feed_forward, (x,), (x,)))
    assert by_torch > 2 * count, "torch has learned it: this module can go"


def test_derivatives_within():
    """Of a function that takes derivatives itself, forward or backward; and within a batch."""
    x, direction = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    cube = lambda x: (x * x * x).sum(-1)
    for function in (
        lambda x: jvp(cube, (x,), (x,))[1],
        lambda x: torch.func.jvp(cube, (x,), (x,))[1],
        lambda x: torch.func.jacfwd(cube)(x),
        lambda x: torch.func.grad(lambda x: cube(x).sum())(x),
        lambda x: torch.func.jacrev(cube)(x),
    ):
        expected = torch.func.jvp(function, (x,), (direction,))
        torch.testing.assert_close(jvp(function, (x,), (direction,)), expected)
        of_each = torch.vmap(lambda x, direction, f=function: jvp(f, (x[None],), (direction[None],))[1][0])
        torch.testing.assert_close(of_each(x, direction).sum(), expected[1].sum())


def test_structures():
    x, y = torch.randn(2, 3, dtype=torch.float64).unbind()
    function = lambda pair, named: {"product": pair[0] * named["b"], "others": (pair[1].exp(), torch.ones(2))}
    at, along = ((x, y), {"b": y}), ((y, x), {"b": x})
    found, expected = (each(function, at, along) for each in (jvp, torch.func.jvp))
    assert found[1].keys() == {"product", "others"} and not found[1]["others"][1].any()
    torch.testing.assert_close(found, expected)
    with pytest.raises(ZeroDivisionError):
        jvp(lambda x: 1 / 0, (x,), (y,))
    torch.testing.assert_close(jvp(torch.sin, (x,), (y,)), torch.func.jvp(torch.sin, (x,), (y,)))


def test_weights_that_move_too():
    x, weight, bias = torch.randn(2, 5, 4), torch.randn(3, 4), torch.randn(3)
    for given in ((x, weight, bias), (x, weight)):
        expected = torch.func.jvp(linear, given, given)
        torch.testing.assert_close(jvp(linear, given, given), expected)
    torch.testing.assert_close(
        jvp(lambda b: linear(x, weight, bias=b), (bias,), (bias,)), (linear(x, weight, bias), bias.expand(2, 5, 3))
    )


def test_convolutions_with_all_their_options():
    x, weight, bias = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
    for call in (
        lambda x: conv2d(x, weight, bias, 2, 1, 1, 4),
        lambda x: conv2d(x, weight, bias=bias, padding="same", groups=4),
        lambda x: conv2d(x, weight, groups=4),
    ):
        torch.testing.assert_close(jvp(call, (x,), (x,)), torch.func.jvp(call, (x,), (x,)))


def test_passes_over_the_tokens():
    """A modulated norm: two as it is, one more for the norm, and two for the product rule."""
    norm, x, cond = AdaLN(8), torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    passes = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            found = operation(*args, **(kwargs or {}))
            y = found[0] if isinstance(found, tuple) else found
            if not operation.is_view and isinstance(y, torch.Tensor) and y.shape == x.shape:
                passes.append(operation)
            return found

    with Counted():
        norm(x, cond)
        once = len(passes)
        jvp(norm, (x, cond), (x, cond))
    assert (once, len(passes) - once) == (2, 5), passes


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same_along(call, reference, *at):
    """Values, tangents and the gradients of both, whichever of the arguments move; and derivatives of second order."""
    directions = tuple(double(*x.shape) for x in at)
    for moving in itertools.product((False, True), repeat=len(at)):
        chosen = [i for i, moves in enumerate(moving) if moves]
        given = tuple(at[i] for i in chosen), tuple(directions[i] for i in chosen)

        def along(jvp, call):
            values = jvp(lambda *moved: call(*(dict(zip(chosen, moved)).get(i, x) for i, x in enumerate(at))), *given)
            weights = torch.linspace(-1, 2, values[0].numel(), dtype=torch.float64).view_as(values[0])
            total = (weights * values[0]).sum() + (weights.square() * values[1]).sum()
            return values, torch.autograd.grad(total, (*at, *directions), materialize_grads=True)

        if chosen:
            torch.testing.assert_close(along(jvp, call), along(torch.func.jvp, reference))

    def twice(call, jvp):
        return jvp(lambda *x: jvp(call, x, directions)[1], at, directions)[1]

    torch.testing.assert_close(twice(call, jvp), twice(reference, torch.func.jvp))


@pytest.mark.parametrize("shape", ((8,), (5, 8)))
def test_layer_norm(shape):
    x, weight, bias = double(3, 5, 8), double(*shape), double(*shape)

    def by(norm):
        return lambda x, weight, bias: norm(x, shape, weight, bias, eps=1e-3)

    assert_same_along(by(layer_norm), by(plain_layer_norm), x, weight, bias)
    assert_same_along(lambda x: layer_norm(x, shape), lambda x: plain_layer_norm(x, shape), x)


@pytest.mark.parametrize("shapes", (((2, 5, 4), (2, 5, 4), (2, 1, 4)), ((2, 1, 4), (2, 5, 4), (4,))))
def test_addcmul(shapes):
    at = [double(*shape) for shape in shapes]
    for value in (1, -0.5):
        assert_same_along(lambda x, a, b: torch.addcmul(x, a, b, value=value), lambda x, a, b: x + value * a * b, *at)


@pytest.mark.parametrize("other", ((2, 4, 5), (4, 1)))
def test_products_sums_and_quotients(other):
    at = double(2, 3, 4), double(*other)
    assert_same_along(torch.matmul, lambda x, y: torch.einsum("...ij,...jk->...ik", x, y), *at)
    at = double(2, 3, 4), double(3, 1)
    for call in (
        lambda x, y: x.mT @ y @ y.mT,
        lambda x, y: 2 * x * y,
        lambda x, y: x / (3 + y.square()) / 2,
        lambda x, y: 1 + x + y + torch.add(x, y, alpha=2) + y,
        lambda x, y: x.add(3, alpha=2) * y,
    ):
        assert_same_along(call, call, *at)


def test_half_precision():
    x, scale, weight = torch.randn(2, 5, 8), torch.randn(2, 1, 8), torch.randn(8, 8)

    def call(x, scale):
        return torch.addcmul(x, layer_norm(linear(x, weight), (8,)), scale)

    exact = [t.float() for t in torch.func.jvp(call, (x, scale), (x + scale, scale))]
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (way(call, (x, scale), (x + scale, scale)) for way in (jvp, torch.func.jvp))
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    torch.testing.assert_close(found[0], plain[0], rtol=0, atol=0)
    assert norm_error(found[1], exact[1]) <= 2 * norm_error(plain[1], exact[1])


def test_of_every_sample():
    weight, x = torch.randn(3, 4), torch.randn(6, 4)

    def call(x):
        return torch.addcmul(x[:3], layer_norm(linear(x, weight), (3,)), x[1:])

    tangents = torch.func.vmap(lambda x: jvp(call, (x,), (x,))[1])(x)
    torch.testing.assert_close(tangents, torch.func.vmap(lambda x: torch.func.jvp(call, (x,), (x,))[1])(x))


@pytest.mark.parametrize("mixer", ("power", "product"))
def test_compiled(mixer):
    function, _, at, direction = image_model(mixer, n_layers=1)
    compiled = torch.compile(lambda *at: jvp(function, at, direction), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*at), jvp(function, at, direction))


def test_compiled_by_the_rules():
    graphs, weight = [], torch.randn(3, 4)

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch.compile(lambda x: jvp(lambda x: linear(x, weight), (x,), (x,)), backend=keep, fullgraph=True)(weight)
    assert [node.target for graph in graphs for node in graph.nodes].count(linear) == 2
