"""Any strides that a user can produce give the right answer: transposed, sliced, unaligned and expanded tensors."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import Case, check, draw_inputs
from layouts import LAYOUTS, with_layout

MODES = {"weight": ("weight", "causal+weight"), "mask": ("mask",)}
CALLS = [
    (argument, form, mode)
    for argument in ("u", "gate", "coeff", "prior", "grad of y", "grad of state", "weight", "mask")
    for form, mode in product(("product", "power"), MODES.get(argument, ("whole", "frames_unequal", "causal")))
    if (argument, form) != ("coeff", "product")
]


@pytest.mark.parametrize("dtype, width", [(torch.float32, 20), (torch.bfloat16, 24)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument, form, mode", CALLS)
def test_one_tensor_laid_out_differently(argument, form, mode, layout, dtype, width, device):
    """All others can be read 16 bytes at a time."""
    inputs = draw_inputs(Case(form, 2, mode, dtype, batch=3, tokens=11, width=width, prior=argument == "prior"))
    check(with_layout(inputs, argument, LAYOUTS[layout]), device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ("product", "power"))
def test_all_tensors_laid_out_differently(form, layout, dtype, device):
    inputs = draw_inputs(
        Case(form, 3, "frames_unequal+weight", dtype, batch=3, tokens=33, width=20, heads=4, prior=True)
    )
    for argument in (*inputs.leaves, "weight", "grad of y", "grad of state"):
        inputs = with_layout(inputs, argument, LAYOUTS[layout])
    check(inputs, device)


@pytest.mark.parametrize("layout", ("transposed", "sliced", "every other", "unaligned"))
@pytest.mark.parametrize("which", ("rotary", "gate_rotary"))
def test_rotary_tables_laid_out_differently(which, layout, device):
    inputs = draw_inputs(Case("power", 2, "causal", tokens=11, width=20, axes=2))
    table = inputs.rotaries[which]
    moved = table._replace(cos=LAYOUTS[layout](table.cos), sin=LAYOUTS[layout](table.sin))
    check(replace(inputs, rotaries=inputs.rotaries | {which: moved}), device)


@pytest.mark.parametrize("layout", ("batch last", "sliced", "one sample", "one value"))
def test_a_strided_state(layout, device):
    """Residual and count of a state that was cut out of a larger one."""
    inputs = draw_inputs(Case("power", 2, "causal", torch.float64, batch=3, prior=True))
    change = LAYOUTS[layout]
    residual = change(inputs.prior_residual)
    count = change(inputs.prior_count) if layout != "one value" else inputs.prior_count[:1].expand(3, 1)
    check(replace(inputs, prior_residual=residual, prior_count=count), device)
