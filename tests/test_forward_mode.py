"""The derivative of whole models in a direction: torch's own, with fewer products."""

import pytest
import torch
from torch.nn.functional import conv2d, linear
from torch.utils._python_dispatch import TorchDispatchMode

from pom_ext import PoM
from pom_ext.forward_mode import jvp
from pom_ext.models import ImageDiT

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default)


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation in PRODUCTS
        return operation(*args, **(kwargs or {}))


def products(call):
    with CountProducts() as counted:
        call()
    return counted.count


def image_model(mixer):
    model = ImageDiT(3, 5, 8, patch=2, dim=16, n_layers=2, n_heads=2, mixer=mixer).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    labels = torch.tensor([1, 4])
    at = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([10.0, 700.0], dtype=torch.float64)
    direction = torch.randn_like(at[0]), torch.tensor([1.0, -30.0], dtype=torch.float64)
    return lambda images, time: model(images, time, labels), model, at, direction


@pytest.mark.parametrize("mixer", ("power", "product"))
def test_a_model_along_a_direction(mixer):
    function, model, at, direction = image_model(mixer)
    value, tangent = jvp(function, at, direction)
    torch.testing.assert_close((value, tangent), torch.func.jvp(function, at, direction))
    step = 1e-6
    ahead, behind = (function(*(x + s * d for x, d in zip(at, direction))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)

    def gradient(jvp):
        value, tangent = jvp(function, at, direction)
        return torch.autograd.grad((value * tangent).sum(), model.parameters(), materialize_grads=True)

    torch.testing.assert_close(gradient(jvp), gradient(torch.func.jvp))


def test_two_products_for_one():
    layer, x = PoM(16, 3, form="power", n_sel_heads=2), torch.randn(2, 5, 16)
    once, twice = products(lambda: layer(x)), products(lambda: jvp(layer, (x,), (x,)))
    assert once == 3 and twice == 2 * once
    assert products(lambda: torch.func.jvp(layer, (x,), (x,))) > twice, "torch has learned it: this module can go"


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


def test_of_every_sample():
    weight, x = torch.randn(3, 4), torch.randn(6, 4)
    tangents = torch.func.vmap(lambda x: jvp(lambda x: linear(x, weight).square(), (x,), (x,))[1])(x)
    torch.testing.assert_close(tangents, 2 * linear(x, weight).square())


def test_compiled():
    layer, x = PoM(16, 3, form="power", n_sel_heads=2), torch.randn(2, 5, 16)
    compiled = torch.compile(lambda x: jvp(layer, (x,), (x,)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), jvp(layer, (x,), (x,)))
