"""Projections that somebody changed, by hooks, adapters, parametrizations or quantisation, are called as they are."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from image_cases import image_model, images
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune
from video_cases import inputs as video_inputs
from video_cases import small as small_video

from pom_ext import PoM, polynomial_mix

DIM, TOKENS = 8, 12
PROJECTIONS = ("context_proj", "gate_proj", "out_proj")
LAYERS = {
    "product": {},
    "product-groups": {"n_groups": 2, "degree": 3},
    "product-recompute": {"memory": "recompute"},
    "power": {"form": "power"},
    "power-heads": {"form": "power", "degree": 3, "n_sel_heads": 4},
    "power-heads-recompute": {"form": "power", "n_sel_heads": 2, "memory": "recompute"},
}
CONTEXTS = ({}, {"frames": 3}, {"frames": [0, 2, 2, TOKENS]}, {"causal": True})


def spelled_out(layer, x, **context):
    """The layer with all of its projections called."""
    mixed = polynomial_mix(
        layer.context_proj(x), layer.gate_proj(x), layer.coeff, form=layer.form, degree=layer.degree,
        n_sel_heads=layer.n_sel_heads, **context,
    )  # fmt: skip
    return layer.out_proj(mixed)


def with_gradients(function, module, x):
    """Output, and the gradients of x and of the parameters that are to have one."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.square().sum().backward()
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": leaf.grad} | {name: p.grad.clone() for name, p in weights.items()}


def assert_spelled_out(layer, x, differentiable=True):
    """In every context, where gradients are recorded and where they are not."""
    for context in CONTEXTS:
        ways = partial(layer, **context), partial(spelled_out, layer, **context)
        with torch.no_grad():
            torch.testing.assert_close(*(way(x) for way in ways))
        if differentiable:
            torch.testing.assert_close(*(with_gradients(way, layer, x) for way in ways))


def near(low, high):
    """Within what weights and inputs of 8 bits may cost, and not what was there before."""
    return 0 < (low - high).norm() < 0.05 * high.norm()


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Adapter(nn.Module):
    """A projection with a low-rank part beside its weight, which it shows as its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def negated(projection):
    """Of another class, with a forward of its own; the weights are where they were."""
    kind = type(projection)
    projection.__class__ = type("Negated", (kind,), {"forward": lambda self, x: -kind.forward(self, x)})
    return projection


def forward_hooked(projection):
    projection.register_forward_hook(lambda module, given, y: 2 * y)
    return projection


def pre_hooked(projection):
    projection.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return projection


def patched(projection):
    """With another forward in the instance alone, as offloading does it."""
    forward = projection.forward
    projection.forward = lambda x: forward(3 * x)
    return projection


def halved(projection):
    nn.utils.parametrize.register_parametrization(projection, "weight", Halved())
    return projection


def pruned(projection):
    """The weight is no parameter any more, and made before every call."""
    return prune.l1_unstructured(projection, "weight", amount=0.5)


def followed(projection):
    return nn.Sequential(projection, nn.ReLU())


CHANGES = {f.__name__: f for f in (negated, forward_hooked, pre_hooked, patched, halved, pruned, followed)}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_changed_projections(name, change, projection):
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM)
    before = layer(x)
    setattr(layer, projection, CHANGES[change](getattr(layer, projection)))
    assert_spelled_out(layer, x)
    assert not torch.allclose(layer(x), before, rtol=0.01)


@pytest.mark.parametrize("change", (Adapter, parametrizations.orthogonal, parametrizations.weight_norm))
@pytest.mark.parametrize("name", [name for name in LAYERS if "groups" not in name])
def test_adapters_and_parametrizations(name, change):
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM)
    for projection in PROJECTIONS:
        changed = change(getattr(layer, projection))
        if change is parametrizations.weight_norm:
            nn.init.uniform_(changed.parametrizations.weight.original0)
        setattr(layer, projection, changed)
    assert_spelled_out(layer, x)


class EightBits(torch.Tensor):
    """A weight as libraries for quantisation have it: it stands for another one, and knows the linear map with it."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(**parts)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].integers * args[1].scale, *args[2:])
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        assert operation is torch.ops.aten.detach.default, operation
        return cls(args[0].integers, args[0].scale)


@pytest.mark.parametrize("name", [name for name in LAYERS if "groups" not in name])
def test_weights_of_another_class(name):
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM)
    before = layer(x)
    for projection in map(partial(getattr, layer), PROJECTIONS):
        scale = projection.weight.detach().abs().amax(1, keepdim=True) / 127
        integers = (projection.weight.detach() / scale).round().to(torch.int8)
        projection.weight = nn.Parameter(EightBits(integers, scale), requires_grad=False)
    assert_spelled_out(layer, x)
    assert near(layer(x), before)


@pytest.mark.parametrize("kind", ("forward_pre", "forward", "full_backward_pre", "full_backward"))
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_are_called_once(name, kind):
    layer, x, called = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM, requires_grad=True), []
    for projection in map(partial(getattr, layer), PROJECTIONS):
        getattr(projection, f"register_{kind}_hook")(lambda module, *tensors: called.append(module))
    for context in CONTEXTS:
        called.clear()
        layer(x, **context).sum().backward()
        assert set(called) == {getattr(layer, projection) for projection in PROJECTIONS} and len(called) == 3


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_that_hooks_change(name):
    """Those of inputs, and of parameters."""
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM, requires_grad=True)
    grads = []
    for projection in map(partial(getattr, layer), PROJECTIONS):
        projection.weight.register_hook(torch.zeros_like)
        projection.weight.register_post_accumulate_grad_hook(lambda weight: grads.append(weight.grad))
    layer(x).sum().backward()
    assert len(grads) == 3 and not any(grad.any() for grad in grads) and x.grad.any()
    x.grad = None
    for projection in (layer.context_proj, layer.gate_proj):
        projection.register_full_backward_hook(lambda module, grads, _: (0 * grads[0],))
    layer(x).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_all_modules(name):
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM)
    hook = lambda module, given, y: -y if isinstance(module, nn.Linear) else None
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_spelled_out(layer, x)
        changed = layer(x)
    finally:
        handle.remove()
    assert not torch.allclose(changed, layer(x), rtol=0.01)


@pytest.mark.parametrize("change", (forward_hooked, halved, Adapter))
def test_changed_projections_compiled(change):
    torch._dynamo.reset()
    layer, x = PoM(DIM, 3, form="power", n_sel_heads=4), torch.randn(2, TOKENS, DIM)
    for projection in PROJECTIONS:
        setattr(layer, projection, change(getattr(layer, projection)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(*(with_gradients(f, layer, x) for f in (compiled, layer)))


def test_lora_of_peft():
    """On all projections of an image model: it counts, learns alone, can be switched off and merged."""
    import peft

    model, given = image_model(mixer=["power", "product"], n_layers=2), images()
    before = model(*given).detach()
    config = peft.LoraConfig(r=2, target_modules=list(PROJECTIONS), init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    y = adapted(*given)
    y.square().sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.any(), name
    with torch.no_grad():
        torch.testing.assert_close(adapted(*given), y)
        assert not torch.allclose(y, before, rtol=0.01)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(*given), before)
        torch.testing.assert_close(adapted.merge_and_unload()(*given), y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LAYERS if "groups" not in name])
def test_quantised_layers(name):
    layer, x = PoM(32, **LAYERS[name]), torch.randn(2, TOKENS, 32)
    quantised = quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    assert callable(quantised.out_proj.weight)  # what a projection that is read past its call would stumble on
    assert_spelled_out(quantised, x, differentiable=False)
    assert near(quantised(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ("image", "video"))
def test_quantised_models(kind):
    if kind == "image":
        model, given, options = image_model(mixer=["power", "product"], n_layers=2), images(), {}
    else:
        model = small_video(mixer=["power", "product"], text_dim=5).float()
        options = {name: t.float() for name, t in video_inputs(model).items()} | {"frame_causal": True}
        given = ()
    quantised = quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert callable(quantised.patch_in.weight) and callable(quantised.blocks[0].mixer.out_proj.weight)
    assert near(quantised(*given, **options), model(*given, **options))
