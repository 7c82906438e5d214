"""Does a family of kernels work at all? `python -m benchmarks.gpu_report.smoke FAMILY --device cuda`: a few calls, held
against the definition in float64 as the tests hold theirs.

The last line tells: "smoke ok: ...", "smoke wrong: ..." with the error, "smoke failed: ..." where a call raises. A call
that hangs ends the process with a traceback of where.
"""

import argparse
import faulthandler
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # their cases, their inputs and their rule for tolerances

import tested_library  # noqa: F401 -- before pom_ext
from cases import (
    Case,
    assert_accurate,
    draw_inputs,
    move,
    norm_error,
    op_function,
    prior_state,
    reference_context,
    reference_function,
    reference_state,
    state_dtype,
    with_gradients,
)
from fused_cases import arguments, draw_readout_call, draw_state_call, read, state_of
from sanitized import update_twice

from pom_ext import State, polynomial_readout, polynomial_state
from pom_ext.ops import reference
from pom_ext.ops.checks import FORMS

from .families import FAMILIES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Vectors and single elements; more tokens than one piece of a sum holds, and more than one launch takes.
SUMS = (
    Case("power", 3, "whole", BF16, tokens=300, width=72, prior=True),
    Case("product", 2, "frames", FP32, tokens=131, width=33),
    Case("power", 4, "cu_seqlens+weight", FP16, tokens=131, width=64, axes=1),
)
MIXES = (
    Case("power", 3, "whole", BF16, tokens=300, width=72),
    Case("product", 2, "weight", FP32, tokens=131, width=33, prior=True),
    Case("power", 3, "whole", BF16, batch=1, tokens=1100, width=64, queries=40, heads=16),
    Case("power", 3, "frames", FP16, tokens=128, width=64, heads=4),
)
# More tokens than the tiles hold whose sums a block adds up by itself.
CAUSAL = (
    Case("power", 3, "causal", BF16, batch=1, tokens=2500, width=72),
    Case("power", 3, "causal", FP16, tokens=131, width=64, heads=4, axes=2),
    Case("product", 2, "causal+weight", FP32, tokens=131, width=33, prior=True),
)
MASKS = (Case("power", 3, "mask", BF16, tokens=70, width=72), Case("product", 2, "mask", FP32, tokens=33, width=33))
UPDATES = (
    Case("power", 3, "whole", BF16, tokens=256, width=72, heads=4),
    Case("product", 2, "weight", FP16, tokens=131, width=33),
)


def state_functions(inputs, device):
    """(the state as an operation, its definition in a dtype) as functions of the leaves."""
    case = inputs.case
    context, rotaries = move((inputs.context, inputs.rotaries), device)

    def operation(u, coeff=None, prior=None):
        state = prior_state(inputs, prior, device)
        rotary = rotaries.get("rotary")
        new = polynomial_state(u, coeff, form=case.form, degree=case.degree, rotary=rotary, state=state, **context)
        return {"state": new.total}

    def definition(dtype):
        return lambda u, coeff=None, prior=None: {"state": reference_state(inputs, u, coeff, prior)[0]}

    return operation, definition


def readout_functions(inputs, device):
    case, leaves = inputs.case, inputs.leaves
    _, rotaries = move((inputs.context, inputs.rotaries), device)
    exact = {name: move(leaf, "cpu", torch.float64) for name, leaf in leaves.items()}
    total, count = reference_state(inputs, exact["u"], exact.get("coeff"), exact.get("prior"))
    inputs.leaves = {"gate": leaves["gate"], "total": total.to(state_dtype(case.dtype))}
    offsets = reference_context(inputs, torch.float64)[0]
    offsets = offsets.get("frames", offsets.get("cu_seqlens"))
    groups = {k: v for k, v in move(inputs.context, device).items() if k in ("frames", "cu_seqlens")}

    def operation(gate, total):
        state = State(total=total, residual=torch.zeros_like(total), count=count.to(device))
        rotary = rotaries.get("gate_rotary")
        return {"y": polynomial_readout(gate, state, form=case.form, n_sel_heads=case.heads, rotary=rotary, **groups)}

    def definition(dtype):
        rotary = reference_context(inputs, dtype)[1].get("gate_rotary")
        rest = {"form": case.form, "n_sel_heads": case.heads, "rotary": rotary, "query_offsets": offsets}
        return lambda gate, total: {"y": reference.readout(gate, total, count.to(total), **rest)}

    return operation, definition


def mix_functions(inputs, device):
    return op_function(inputs, device), lambda dtype: reference_function(inputs, dtype)


def hold(functions, case, device, backward):
    """Outputs, or with `backward` the gradients of all leaves, of an operation against its definition."""
    torch.manual_seed(0)
    inputs = draw_inputs(case)
    if functions is state_functions:
        del inputs.leaves["gate"]
    operation, definition = functions(inputs, device)
    dtypes = {"y": case.dtype, "state": state_dtype(case.dtype)}
    with torch.no_grad():
        shapes = {
            name: t.shape for name, t in definition(torch.float64)(**move(inputs.leaves, "cpu", torch.float64)).items()
        }
    grads = {
        name: ((1 + torch.randn(shape)) / max(shape[1], 1) ** 0.5).to(dtypes[name]) for name, shape in shapes.items()
    }

    def results(function, device, dtype=None):
        leaves = move(inputs.leaves, device, dtype)
        if not backward:
            with torch.no_grad():
                return function(**leaves)
        found = with_gradients(function, leaves, move(grads, device, dtype))
        return {name: t for name, t in found.items() if name.startswith("grad ")}

    exact, plain = (results(definition(dtype), "cpu", dtype) for dtype in (torch.float64, case.dtype))
    assert_accurate(results(operation, device), exact, plain, case)


def hold_update(case, device):
    """Twice the same frame, added to an empty state."""
    torch.manual_seed(0)
    inputs = draw_inputs(case)
    with torch.no_grad():
        results = update_twice(inputs, device)

    def twice(dtype):
        leaves = move(inputs.leaves, "cpu", dtype)
        total, count = reference_state(inputs, leaves["u"], leaves.get("coeff"), None)
        y = reference.readout(leaves["gate"], 2 * total, 2 * count, form=case.form, n_sel_heads=case.heads)
        return {"updated": 2 * total, "y of the update": y}

    assert_accurate(results, twice(torch.float64), twice(case.dtype), case)


def has_kernel(name, device):
    key = "CPU" if device == "cpu" else "CUDA"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pom_ext::{name}", key)


def hold_norm(result, exact, plain):
    error, allowed = norm_error(result, exact), 2 * norm_error(plain, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def calls(draw, device, large):
    """(call, its arguments on the device) of operations with their projections; large: sizes that only a GPU gets."""
    for context, sizes in (("whole", {}), ("offsets", {}), *((("whole", large),) if device != "cpu" else ())):
        torch.manual_seed(0)
        call = draw(context, BF16, bias=True, **sizes)
        yield call, arguments(call, device)


def hold_folded(device):
    """Whether it was done at once."""
    ops, large = torch.ops.pom_ext, {"queries": 3000, "heads": 16, "dim": 256, "width": 64, "out_dim": 256}
    for call, words in calls(draw_readout_call, device, large):
        at_once = has_kernel("folds_at_once", device) and ops.folds_at_once(*words)
        if at_once:
            y = ops.folded_readout_at_once(*words)
        else:
            y = ops.folded_readout(*words[:-1], None, None, 0, words[-1])
        hold_norm(y, read(call, torch.float64), read(call, BF16))
    return at_once


def hold_project(device):
    """Whether it was done at once."""
    ops = torch.ops.pom_ext
    for call, words in calls(draw_state_call, device, {"tokens": 3000, "dim": 256, "width": 640}):
        at_once = has_kernel("projects_at_once", device) and ops.projects_at_once(*words)
        if at_once:
            total = ops.project_state_at_once(*words)[0]
        else:
            *others, degree = words
            total = ops.project_state(*others, None, None, 0, FORMS.index("power"), degree, False)[0]
        hold_norm(total, state_of(call, torch.float64)[0], state_of(call, BF16)[0])
    return at_once


def check(family, device):
    """Run a family. Returns what to tell; raises AssertionError where a result is wrong."""
    sums = {"state": (state_functions, SUMS), "readout": (readout_functions, SUMS), "mix": (mix_functions, MIXES)}
    sums |= {"causal": (mix_functions, CAUSAL), "mask": (mix_functions, MASKS)}
    name, _, backward = family.partition("_")
    if name in ("folded", "project"):
        at_once = {"folded": hold_folded, "project": hold_project}[name](device)
        return "at once" if at_once else "by other kernels: this device has none for it"
    cases = UPDATES if name == "update" else sums[name][1]
    for case in cases:
        try:
            if name == "update":
                hold_update(case, device)
            else:
                hold(sums[name][0], case, device, bool(backward))
                if name == "mask":
                    hold(sums[name][0], case, device, True)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None
    return f"{len(cases)} cases"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report.smoke", description=__doc__.split("?")[0])
    parser.add_argument("family", choices=tuple(FAMILIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--seconds", type=float, help="the most that the calls may take; importing torch does not count"
    )
    options = parser.parse_args(arguments)
    if options.seconds:
        faulthandler.dump_traceback_later(options.seconds, exit=True)
    try:
        said, status = f"ok: {check(options.family, options.device)}", 0
    except AssertionError as error:
        said, status = f"wrong: {error}", 1
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is what the report is for
        said, status = f"failed: {type(error).__name__}: {error}", 2
    if options.seconds:
        faulthandler.cancel_dump_traceback_later()
    print("smoke", said.replace("\n", " "), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
