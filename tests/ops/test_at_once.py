"""Operations at once with their projections, on GPUs that have kernels for it and in their stand-in: held against the
definition in float64."""

import pytest
import torch
from cases import HALF, norm_error
from fused_cases import arguments, draw_readout_call, draw_state_call, read, state_of

from pom_ext.ops import dispatch, projected
from pom_ext.ops.arguments import OPERATIONS
from pom_ext.ops.arguments import call as call_operation
from pom_ext.ops.checks import FORMS
from pom_ext.ops.projected_cuda import IMPLEMENTATIONS

# With a test's library the CUDA kernels run on the CPU; the library itself has none for the CPU.
IN_STAND_IN = torch._C._dispatch_has_kernel_for_dispatch_key("pom_ext::fused_project_state", "CPU")
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
    assert call_operation("supports_fused_project_state", arguments(call, hopper))
    total, residual, count = call_operation("fused_project_state", arguments(call, hopper))
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
    args = OPERATIONS["project_state"].defaults | arguments(call, hopper) | {"form": FORMS.index("power")}
    fused = change in ({}, {"prior": True})
    assert call_operation("supports_fused_project_state", args) == fused
    states = []
    for unmeasured in (dispatch.UNMEASURED, set()):
        monkeypatch.setattr(dispatch, "UNMEASURED", unmeasured)
        with dispatch.explained() as decisions:
            states.append(IMPLEMENTATIONS["project_state"](args))
        assert (decisions[0].taken == "fused kernel") == (fused and not unmeasured)
    (total, _, count, *_), (same_total, _, same_count, *_) = states
    torch.testing.assert_close(same_total, total, rtol=0, atol=0.02 * total.abs().max().item() if fused else 0)
    assert torch.equal(same_count, count)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [2, 16, 24])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("context", ["whole", "even", "offsets"])
def test_folded_readout(context, dtype, form, heads, bias, tensor_cores):
    call = draw_readout_call(context, dtype, bias, form, heads)
    assert call_operation("supports_fused_folded_readout", arguments(call, tensor_cores))
    y = call_operation("fused_folded_readout", arguments(call, tensor_cores))
    exact, plain = read(call, torch.float64), read(call, dtype)
    error, allowed = norm_error(y.cpu(), exact), 2 * norm_error(plain, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("change", [{}, {"heads": 65}, {"width": 12}, {"dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("context", ["whole", "even", "offsets"])
def test_other_readouts_take_the_old_way(context, change, tensor_cores):
    call = draw_readout_call(context, **{"dtype": torch.bfloat16, "bias": True} | change)
    args = OPERATIONS["folded_readout"].defaults | arguments(call, tensor_cores)
    assert call_operation("supports_fused_folded_readout", args) == (not change)
    y, _ = IMPLEMENTATIONS["folded_readout"](args)
    other, _ = projected.folded_readout_decomposition(args)
    torch.testing.assert_close(y, other, rtol=0, atol=0 if change else 0.05 * other.abs().max().item())
