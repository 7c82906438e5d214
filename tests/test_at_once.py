"""Projection and state as one kernel, on GPUs that have it and in its stand-in: held against the definition in float64."""

from types import SimpleNamespace

import pytest
import torch
from cases import HALF, norm_error

from pom_ext import _blocks, reference
from pom_ext.checks import FORMS

OPS = torch.ops.pom_ext
# With a test's library the CUDA kernels run on the CPU; the library itself has none for the CPU.
IN_STAND_IN = torch._C._dispatch_has_kernel_for_dispatch_key("pom_ext::project_state_at_once", "CPU")
CONTEXTS = ("whole", "weight", "offsets", "cumulative", "cumulative+weight")


@pytest.fixture
def at_once(device):
    """The device, if it is one that the kernel is for."""
    if not (IN_STAND_IN if device.type == "cpu" else torch.cuda.get_device_capability(device) == (9, 0)):
        pytest.skip("only for GPUs of compute capability 9.0, and in test_cuda_on_cpu.py for their stand-in")
    return device


def draw_call(context, dtype, bias, degree=3, batch=2, tokens=150, dim=72, width=264):
    x = torch.randn(batch, tokens, dim).to(dtype)
    weight = (torch.randn(width, dim) / dim**0.5).to(dtype)
    return SimpleNamespace(
        x=x,
        weight=weight,
        bias=torch.randn(width).to(dtype) if bias else None,
        coeff=torch.randn(width, degree),
        token_weight=torch.rand(batch, tokens) if "weight" in context else None,
        offsets=None if context in ("whole", "weight") else torch.tensor([0, 10, 10, 100, tokens]),
        cumulative="cumulative" in context,
        degree=degree,
    )


def arguments(call, device):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in vars(call).values()]


def state_of(call, dtype):
    """By the definition, and its projections by plain torch, in one dtype."""
    bias = None if call.bias is None else call.bias.to(dtype)
    u = torch.nn.functional.linear(call.x.to(dtype), call.weight.to(dtype), bias)
    frames = {} if call.offsets is None else {"frames" if call.cumulative else "cu_seqlens": call.offsets.tolist()}
    weight = None if call.token_weight is None else call.token_weight.to(dtype)
    return reference.state(u, call.coeff.to(dtype), form="power", degree=call.degree, weight=weight, **frames)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_state(context, dtype, bias, at_once):
    call = draw_call(context, dtype, bias)
    assert OPS.projects_at_once(*arguments(call, at_once))
    total, residual, count = OPS.project_state_at_once(*arguments(call, at_once))
    (exact, exact_count), (plain, _) = state_of(call, torch.float64), state_of(call, dtype)
    error, allowed = norm_error(total.cpu(), exact), 2 * norm_error(plain, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    torch.testing.assert_close(count.cpu(), exact_count.double(), rtol=1e-12, atol=0)
    assert (residual.abs() <= torch.finfo(torch.float32).eps * total.abs()).all()


@pytest.mark.parametrize("change", [{}, {"degree": 5}, {"width": 260}, {"dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_others_take_the_old_way(context, change, at_once, monkeypatch):
    """What the layer calls: by this kernel where it can be, and the same to rounding."""
    call = draw_call(context, **{"dtype": torch.bfloat16, "bias": True} | change)
    x, weight, bias, coeff, token_weight, offsets, cumulative, degree = arguments(call, at_once)
    rest = token_weight, offsets, cumulative, None, None, 0, FORMS.index("power"), degree
    assert OPS.projects_at_once(*arguments(call, at_once)) == (not change)
    states = []
    for taken in (False, True):
        monkeypatch.setattr(_blocks, "AT_ONCE", taken)
        states.append(_blocks.project_state(x, weight, bias, coeff, *rest))
    (total, _, count, _), (same_total, _, same_count, _) = states
    torch.testing.assert_close(same_total, total, rtol=0, atol=0 if change else 0.02 * total.abs().max().item())
    assert torch.equal(same_count, count)
