"""Operations at once with their projections, on GPUs that have kernels for it and in their stand-in: held against the
definition in float64."""

import pytest
import torch
from cases import HALF, norm_error
from fused_cases import arguments, draw_readout_call, draw_state_call, read, state_of

from pom_ext.ops import _blocks, _projections
from pom_ext.ops.checks import FORMS

OPS = torch.ops.pom_ext
# With a test's library the CUDA kernels run on the CPU; the library itself has none for the CPU.
IN_STAND_IN = torch._C._dispatch_has_kernel_for_dispatch_key("pom_ext::project_state_at_once", "CPU")
CONTEXTS = ("whole", "weight", "offsets", "cumulative", "cumulative+weight")


def device_if(device, capable):
    if not (IN_STAND_IN if device.type == "cpu" else capable(torch.cuda.get_device_capability(device))):
        pytest.skip("only for GPUs that have what it takes, and in test_cuda_on_cpu.py for their stand-in")
    return device


@pytest.fixture
def hopper(device):
    return device_if(device, lambda capability: capability == (9, 0))


@pytest.fixture
def tensor_cores(device):
    """Those that take bfloat16."""
    return device_if(device, lambda capability: capability >= (8, 0))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_state(context, dtype, bias, prior, hopper):
    call = draw_state_call(context, dtype, bias, prior=prior)
    assert OPS.projects_at_once(*arguments(call, hopper))
    total, residual, count = OPS.project_state_at_once(*arguments(call, hopper))
    (exact, exact_count), (plain, _) = state_of(call, torch.float64), state_of(call, dtype)
    error, allowed = norm_error(total.cpu(), exact), 2 * norm_error(plain, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    torch.testing.assert_close(count.cpu(), exact_count.double(), rtol=1e-12, atol=0)
    assert (residual.abs() <= torch.finfo(torch.float32).eps * total.abs()).all()


@pytest.mark.parametrize(
    "change", [{}, {"prior": True}, {"degree": 5}, {"width": 260}, {"dtype": torch.float32}], ids=str
)
@pytest.mark.parametrize("context", CONTEXTS)
def test_other_states_take_the_old_way(context, change, hopper, monkeypatch):
    """What the layer calls: by this kernel where it can be, and the same to rounding."""
    call = draw_state_call(context, **{"dtype": torch.bfloat16, "bias": True} | change)
    x, weight, bias, coeff, token_weight, offsets, cumulative, *prior, degree = arguments(call, hopper)
    rest = token_weight, offsets, cumulative, *prior, None, None, 0, FORMS.index("power"), degree
    taken_at_once = change in ({}, {"prior": True})
    assert OPS.projects_at_once(*arguments(call, hopper)) == taken_at_once
    states = []
    for taken in (False, True):
        monkeypatch.setattr(_blocks, "AT_ONCE", taken)
        states.append(_blocks.project_state(x, weight, bias, coeff, *rest))
    (total, _, count, _), (same_total, _, same_count, _) = states
    torch.testing.assert_close(same_total, total, rtol=0, atol=0.02 * total.abs().max().item() if taken_at_once else 0)
    assert torch.equal(same_count, count)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [2, 16, 24])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("context", ["whole", "even", "offsets"])
def test_folded_readout(context, dtype, form, heads, bias, tensor_cores):
    call = draw_readout_call(context, dtype, bias, form, heads)
    assert OPS.folds_at_once(*arguments(call, tensor_cores))
    y = OPS.folded_readout_at_once(*arguments(call, tensor_cores))
    exact, plain = read(call, torch.float64), read(call, dtype)
    error, allowed = norm_error(y.cpu(), exact), 2 * norm_error(plain, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("change", [{}, {"heads": 65}, {"width": 12}, {"dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("context", ["whole", "even", "offsets"])
def test_other_readouts_take_the_old_way(context, change, tensor_cores):
    call = draw_readout_call(context, **{"dtype": torch.bfloat16, "bias": True} | change)
    *rest, form = arguments(call, tensor_cores)
    assert OPS.folds_at_once(*rest, form) == (not change)
    y = _blocks.folded_readout(*rest, None, None, 0, form)
    other = _projections.folded_readout(*rest, None, None, 0, form)
    torch.testing.assert_close(y, other, rtol=0, atol=0 if change else 0.05 * other.abs().max().item())
