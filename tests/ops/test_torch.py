"""What torch expects of an operation: opcheck, fake tensors, subclasses, and an import that does nothing else."""

import ctypes
import gc
import subprocess
import sys

import pytest
import torch
from cases import FORMS, Case, draw_inputs, op_function
from recorded_calls import RecordCalls
from torch._subclasses.fake_tensor import FakeTensorMode

from pom_ext import PoM, State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.ops import _blocks

GRADIENTS = {f"{name}_backward" for name in ("state", "readout", "causal_mix", "project_state", "project_readout")}
ALONG = {f"{name}_along" for name in ("project_state", "project_readout", "folded_readout")}
PROJECTED = {"linear", "project_state", "project_readout", "folded_readout", *ALONG}  # on the CPU alone
IN_PLACE = {"update", "add_to_state"}
OPS = {"state", "readout", "causal_mix", "mix", *IN_PLACE, *PROJECTED, *GRADIENTS}
# What some of these are on a GPU, below all rules of torch; with questions whether they can be.
AT_ONCE = {"project_state_at_once", "projects_at_once", "folded_readout_at_once", "folds_at_once"}


def recorded_calls(form, mode, device="cpu"):
    """The operations that a forward and backward pass calls, as they were called; of an update, which has no gradient."""
    kind = mode.split("+")[0]
    prior = kind not in ("mask", "cu_seqlens")
    inputs = draw_inputs(Case(form, 2, mode, tokens=6, width=4, axes=1 if form == "power" else 0, prior=prior))
    leaves = {name: leaf.to(device).requires_grad_() for name, leaf in inputs.leaves.items()}
    with RecordCalls() as record:
        outputs = op_function(inputs, device)(**leaves)
        sum(output.sum() for output in outputs.values()).backward()
        if kind == "whole":
            u, gate, *coeff = (leaf.detach() for name, leaf in leaves.items() if name != "prior")
            polynomial_update(u, gate, State.empty(2, u.shape[2], device=device), *coeff, form=form, degree=2)
    return record.calls


def recorded_projections(form, context):
    """The same for the operations that a layer has beside them, stored and recomputed."""
    with RecordCalls() as record:
        for memory in ("store", "recompute"):
            layer = PoM(6, 3, form=form, rope="1d" if form == "power" else None, bias=True, memory=memory)
            layer(torch.randn(2, 7, 6, requires_grad=True), **context).sum().backward()
        with torch.no_grad():
            x = torch.randn(2, 70, 6)
            layer(x, causal=True)
            matrix, coeff = layer.context_proj.weight, layer.coeff
            state = polynomial_state(layer.context_proj(x), coeff, form=form, degree=3).state_dict().values()
            for before in (state, (None, None, None)):
                given = x, matrix, None, coeff, None, None, False, *before, None, None, 0, FORMS.index(form), 3
                torch.ops.pom_ext.project_state(*given, False)
                _blocks.project_state(*given)
            for heads in (1, 2):
                layer = PoM(6, 3, form=form, n_sel_heads=heads)
                layer(x)
                torch.func.jvp(layer, (x,), (x,))
    return [call for call in record.calls if call[0].__name__.startswith(("linear", "project", "folded", "add"))]


def test_every_operation_is_recorded():
    """What the opcheck tests rest on: a few ways through the package call all operations there are."""
    calls = [call for mode in ("whole", "causal", "frames") for call in recorded_calls("power", mode)]
    called = {op.__name__.removesuffix(".default") for op, _ in calls + recorded_projections("power", {})}
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pom_ext::")]
    of_tensors = {schema.name.removeprefix("pom_ext::") for schema in schemas if "Tensor" in str(schema)}
    assert called == of_tensors - AT_ONCE == OPS


@pytest.mark.parametrize("mode", ("whole", "weight", "causal+weight", "frames_unequal+weight", "mask"))
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, mode, device):
    check_calls(recorded_calls(form, mode, device))


@pytest.mark.parametrize("context", ({"weight": torch.rand(2, 7)}, {"frames": [0, 2, 2, 7]}), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_projections(form, context):
    check_calls(recorded_projections(form, context))


def check_calls(calls):
    for op, args in calls:
        differentiable = op.__name__.removesuffix(".default") not in {*GRADIENTS, *IN_PLACE}
        args = [
            arg.detach().requires_grad_(arg.requires_grad and differentiable) if isinstance(arg, torch.Tensor) else arg
            for arg in args
        ]
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("context", ({}, {"causal": True}, {"frames": [0, 2, 2, 6]}, {"mask": (2, 6, 6)}), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_fake_tensors_have_the_right_shapes(dtype, context):
    """Shapes, dtypes and strides without computing anything, as on the meta device."""

    def run():
        modes = {name: torch.ones(value) if name == "mask" else value for name, value in context.items()}
        u, gate = torch.ones(2, 6, 8, dtype=dtype), torch.ones(2, 6, 8, dtype=dtype)
        total = polynomial_state(u, form="product", degree=2, **modes).total
        return polynomial_mix(u, gate, form="product", degree=2, **modes), total

    with FakeTensorMode():
        fake = run()
    for one, other in zip(fake, run(), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_meta_device():
    layer = PoM(8, 2, form="power", n_sel_heads=4).to("meta")
    y, state = layer(torch.empty(2, 6, 8, device="meta"), frames=3, return_state=True)
    assert y.shape == (2, 6, 8) and state.total.shape == (2, 1, 16) and state.total.is_meta


class Tagged(torch.Tensor):
    """A tensor subclass, such as those of images or of quantised weights."""


def test_tensor_subclasses(device):
    u, gate = torch.randn(2, 2, 6, 8, device=device).unbind()
    expected = polynomial_mix(u, gate, form="product", degree=2)
    y = polynomial_mix(u.as_subclass(Tagged), gate.as_subclass(Tagged), form="product", degree=2)
    assert torch.equal(torch.Tensor(y), expected)
    leaf = torch.nn.Parameter(u)
    polynomial_mix(leaf, gate, form="product", degree=2).sum().backward()
    assert leaf.grad.shape == u.shape


def test_inference_mode(device):
    u, gate = torch.randn(2, 2, 6, 8, device=device).unbind()
    expected = polynomial_mix(u, gate, form="product", degree=2)
    with torch.inference_mode():
        state = polynomial_state(u, form="product", degree=2)
        assert torch.equal(polynomial_mix(u, gate, form="product", degree=2), expected)
        assert torch.equal(polynomial_readout(gate, state + state, form="product"), expected)


def run_python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_import_prints_nothing_and_brings_nothing_along():
    """Beside torch and its own modules only small things come with the package: no plots, no datasets, no compiler."""
    script = """
import sys, torch, torch.library
before = set(sys.modules)
import pom_ext
heavy = {"accelerate", "diffusers", "matplotlib", "mlxtend", "sklearn", "scipy", "PIL", "typer", "rich", "tqdm",
         "transformers", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "safetensors"}
new = set(sys.modules) - before
assert not heavy & new, heavy & new
assert not torch.cuda.is_initialized()
"""
    result = run_python(script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_without_the_compiled_library_the_call_says_how_to_build_it():
    script = """
import sys
sys.modules["pom_ext._C"] = None  # as where it was not built
import torch, pom_ext
layer = pom_ext.PoM(8)
print("imported")
try:
    layer(torch.zeros(1, 2, 8))
except ImportError as error:
    print(error)
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    imported, message = result.stdout.strip().split("\n", 1)
    assert imported == "imported" and "pip install" in message


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use():
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc for the bytes in use")
@pytest.mark.parametrize("form", ["product", "power"])
def test_calls_leave_nothing_behind(form):
    """A string argument of an operation was copied by torch at every call and never freed: no operation takes one."""
    u, gate = torch.randn(1, 8, 16, requires_grad=True), torch.randn(1, 8, 16, requires_grad=True)
    coeff = torch.randn(16, 2) if form == "power" else None
    state = State.empty(1, 16)

    def calls():
        mixed = [
            polynomial_mix(u, gate, coeff, form=form, degree=2, **mode)
            for mode in ({}, {"causal": True}, {"frames": 4})
        ]
        sum(y.sum() for y in mixed).backward()
        with torch.no_grad():
            polynomial_update(u, gate, state, coeff, form=form, degree=2)

    for _ in range(200):
        calls()
    before = bytes_in_use()
    for _ in range(1000):
        calls()
    assert (bytes_in_use() - before) / 1000 < 16
