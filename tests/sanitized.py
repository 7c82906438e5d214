"""A small selection of calls for compute-sanitizer: `python tests/sanitized.py cuda`.

Every kernel a few times, forward, backward and update: vectors and single elements, sizes that fill no block, every
context mode.
"""

import sys
from itertools import product

import torch
from cases import FORMS, Case, draw_inputs, move, run_op, state_dtype

from pom_ext import State, polynomial_update

MODES = ("whole", "weight", "mask", "frames", "frames_unequal", "causal", "cu_seqlens")
SELECTION = (
    *(Case(form, 3, mode, torch.bfloat16, tokens=70, width=72) for form, mode in product(FORMS, MODES)),
    *(Case(form, 2, mode, torch.float32, tokens=131, width=33, prior=mode in ("whole", "causal"))
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


def main(device):
    """Run all of them on a device. Results are left to the tests; here they must only be numbers."""
    for case in SELECTION:
        torch.manual_seed(0)
        inputs = draw_inputs(case)
        results = run_op(inputs, device)
        if case.mode in ("whole", "weight"):
            results |= update_twice(inputs, device)
        for name, result in results.items():
            assert torch.isfinite(result).all(), f"{case}: {name}"
    print(f"{len(SELECTION)} cases on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
