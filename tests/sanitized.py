"""A small selection of calls for compute-sanitizer: `python tests/sanitized.py cuda`, `--help` for parts of it.

Every kernel a few times, forward, backward and update: vectors and single elements, sizes that fill no block, every
context mode. The kernels that work at once with their projections can be had alone, for a process of their own.
"""

import argparse
from itertools import product

import tested_library  # noqa: F401 -- before pom_ext
import torch
from cases import FORMS, Case, draw_inputs, move, op_function, run_op, state_dtype
from fused_cases import arguments, draw_readout_call, draw_state_call

from pom_ext import State, polynomial_update

PARTS = ("update", "backward", "folded", "project")  # that can be left out, beside the modes
MODES = ("whole", "weight", "mask", "frames", "frames_unequal", "causal", "cu_seqlens")
SELECTION = (
    *(Case(form, 3, mode, torch.bfloat16, tokens=70, width=72) for form, mode in product(FORMS, MODES)),
    *(Case(form, 2, mode, torch.float32, tokens=131, width=33, prior=mode not in ("mask", "cu_seqlens"))
      for form, mode in product(FORMS, MODES)),
    *(Case("power", 4, mode, torch.float16, tokens=70, width=64, heads=heads, axes=2)
      for mode, heads in product(("whole", "frames", "causal"), (1, 4))),
    *(Case(form, 5, mode, torch.float64, tokens=9, width=5) for form, mode in product(FORMS, ("frames", "causal"))),
    Case("power", 3, "whole", torch.bfloat16, batch=1, tokens=1100, width=64, queries=40),
)  # fmt: skip


def update_twice(inputs, device):
    """The state and the last y of a stream of the same frame twice."""
    case = inputs.case
    frame = move({**inputs.leaves, **inputs.context, **inputs.rotaries}, device)
    frame.pop("prior", None)
    state = State.empty(case.batch, case.channels, dtype=state_dtype(case.dtype), device=device)
    for _ in range(2):
        y = polynomial_update(state=state, form=case.form, degree=case.degree, n_sel_heads=case.heads, **frame)
    return {"updated": state.total, "y of the update": y}


def added_in_place(device):
    """A state that tokens are added to twice, as blocks of projected tokens are."""
    for form, dtype, width in (("power", torch.bfloat16, 72), ("product", torch.float32, 33)):
        u = torch.randn(2, 131, width, device=device).to(dtype)
        coeff = torch.randn(width, 3, device=device) if form == "power" else None
        state = State.empty(2, width, device=device).state_dict().values()
        rest = coeff, None, None, None, None, None, None, 0, FORMS.index(form), 3
        for empty in (True, False):
            torch.ops.pom_ext.add_to_state(u, *rest, empty, *state)
        yield from state


def at_once(device, without=()):
    """What the tensor cores take together with its projections, where this device's can."""
    ops, key = torch.ops.pom_ext, "CPU" if device == "cpu" else "CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("pom_ext::folds_at_once", key):
        return
    for context in ("whole", "weight", "offsets") if "project" not in without else ():
        call = arguments(draw_state_call(context, torch.bfloat16, bias=True, prior=context != "weight"), device)
        if ops.projects_at_once(*call):
            yield from ops.project_state_at_once(*call)
    for context in ("whole", "even", "offsets") if "folded" not in without else ():
        call = arguments(draw_readout_call(context, torch.bfloat16, bias=True, heads=24), device)
        if ops.folds_at_once(*call):
            yield ops.folded_readout_at_once(*call)


def results_of(case, device, without=()):
    """By name: outputs and gradients of a case, and where it is one for it those of an update."""
    torch.manual_seed(0)
    inputs = draw_inputs(case)
    if "backward" in without:
        with torch.no_grad():
            results = op_function(inputs, device)(**move(inputs.leaves, device))
    else:
        results = run_op(inputs, device)
    if case.mode in ("whole", "weight") and "update" not in without:
        results |= update_twice(inputs, device)
    return results


def main(arguments=None):
    """Run what is selected. Results are left to the tests; here they must only be numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("device")
    parser.add_argument(
        "--only", choices=("cases", "at_once"), help="the ordinary kernels, or those at once with projections"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=(*MODES, *PARTS), metavar="PART", help="to leave out"
    )
    options = parser.parse_args(arguments)
    cases = [case for case in SELECTION if options.only != "at_once" and case.mode not in options.without]
    for case in cases:
        for name, result in results_of(case, options.device, options.without).items():
            assert torch.isfinite(result).all(), f"{case}: {name}"
    whole = options.only != "at_once" and "whole" not in options.without
    for result in added_in_place(options.device) if whole else ():
        assert torch.isfinite(result).all()
    taken = 0
    for result in at_once(options.device, options.without) if options.only != "cases" else ():
        assert torch.isfinite(result).all()
        taken += 1
    print(f"{len(cases)} cases on {options.device}, and {taken} results of its tensor cores")


if __name__ == "__main__":
    main()
