"""Odd sizes: many samples and none, one token and none, prime widths, stride 0, and more than 2^31 elements."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FORMS, MODES, Case, check, draw_inputs, op_function, run_op
from layouts import LAYOUTS, with_layout
from test_determinism import DTYPES, assert_bit_identical, inputs_of, of_samples, pick

from pom_ext import PoM, State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.models import ImageDiT

HUGE, WIDTH = 2**31, 1022  # elements, and channels: no multiple of anything but 2, 7 and 73
TAIL = 50  # the last tokens, which are all that is not zero


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_more_samples_than_a_short_integer_counts(form, mode, device):
    inputs = inputs_of(form, mode, batch=65_537, tokens=2, width=3)
    samples = [0, 32_768, 65_535, 65_536]
    assert_bit_identical(of_samples(run_op(inputs, device), samples), run_op(pick(inputs, samples), device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_token_sees_itself_in_every_mode(form, dtype, device):
    inputs = draw_inputs(Case(form, 3, "whole", dtype, batch=3, tokens=1, width=33))
    expected = run_op(inputs, device)
    modes = ({"causal": True}, {"frames": 1}, {"weight": torch.ones(3, 1)}, {"frames": [0, 0, 1]})
    for context in modes:
        assert_bit_identical(expected, run_op(replace(inputs, context=context), device))
    inputs = replace(inputs, case=replace(inputs.case, mode="mask"))  # returns no state
    del expected["state"], inputs.output_grads["state"]
    for context in ({"mask": torch.ones(3, 1, 1)}, {"cu_seqlens": [0, 1, 1]}):
        without = run_op(replace(inputs, context=context), device)
        assert_bit_identical({name: expected[name] for name in ("y", "grad gate")}, without)


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_of_no_tokens_leaves_the_stream_as_it_is(form, device):
    u, gate = torch.randn(2, 2, 70, 12, device=device).unbind()
    coeff = torch.randn(12, 3, device=device) if form == "power" else None
    options = {"form": form, "degree": 3}
    state = polynomial_state(u, coeff, **options)
    before = state.clone().state_dict()
    expected = polynomial_readout(gate, state, form=form)
    y, after = polynomial_mix(u[:, :0], gate, coeff, state=state, return_state=True, **options)
    summed = polynomial_state(u[:, :0], coeff, state=state, **options)
    assert torch.equal(polynomial_update(u[:, :0], gate, state, coeff, **options), expected)
    assert torch.equal(y, expected)
    for each in (after, summed, state):
        assert_bit_identical(before, each.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_trains_and_streams(form, device):
    layer = PoM(12, 3, form=form).to(device)
    y, state = layer(torch.empty(0, 5, 12, device=device), return_state=True)
    (y.sum() + state.mean().sum()).backward()
    assert y.shape == (0, 5, 12) and state.total.shape == (0, 1, layer.state_width)
    assert all(parameter.grad.shape == parameter.shape and not parameter.grad.any() for parameter in layer.parameters())
    empty = torch.empty(0, 5, layer.state_width, device=device)
    with torch.no_grad():
        assert polynomial_update(empty, empty, state, layer.coeff, form=form, degree=3).shape == empty.shape
    model = ImageDiT(3, 5, 8, dim=32, n_layers=1, n_heads=2, mixer=form).to(device)
    time, labels = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert model(torch.empty(0, 3, 8, 8, device=device), time, labels).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (2, 3, 7, 31, 61, 127, 257, 1021))
@pytest.mark.parametrize("mode", ("whole", "causal"))
@pytest.mark.parametrize("form", FORMS)
def test_prime_sizes(form, mode, width, dtype, device):
    check(draw_inputs(Case(form, 3, mode, dtype, batch=3, tokens=11, width=width)), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_strides_change_no_bit(form, mode, layout, device):
    """All tensors laid out differently, beside the same numbers without gaps and repetitions."""
    inputs = inputs_of(form, mode, width=9)
    names = {*inputs.leaves, *inputs.context} & {"u", "gate", "coeff", "weight", "mask"}
    strided, dense = inputs, inputs
    for name in (*sorted(names), "grad of y", "grad of state"):
        strided = with_layout(strided, name, LAYOUTS[layout])
        dense = with_layout(dense, name, lambda t: LAYOUTS[layout](t).clone(memory_format=torch.contiguous_format))
    assert_bit_identical(run_op(strided, device), run_op(dense, device))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_a_sum_is_one_number(form, mode, device):
    """What backward() of a sum hands over has stride 0 everywhere, and the cut of a larger tensor has gaps."""
    inputs = inputs_of(form, mode, dtype=torch.bfloat16)
    leaves = {name: torch.stack([t, t], -1)[..., 0].to(device).requires_grad_() for name, t in inputs.leaves.items()}
    y = op_function(inputs, device)(**leaves)["y"]
    expected = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)
    y.sum().backward()
    assert_bit_identical(dict(zip(leaves, expected)), {name: leaf.grad for name, leaf in leaves.items()})


def zeros(*shape, device):
    """bfloat16 zeros. On a CPU they take no memory until they are written: all pages are the kernel's one of zeros."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)


def behind_zeros(tail, tokens):
    """So many tokens of zeros in every sample, and then `tail`."""
    tensor = zeros(len(tail), tokens + tail.shape[1], tail.shape[2], device=tail.device)
    tensor[:, tokens:] = tail
    return tensor


def after_zeros(batch, tokens, device):
    """The state after so many tokens of zeros, whose features are zero."""
    state = State.empty(batch, WIDTH, device=device)
    return State(state.total, state.residual, torch.full_like(state.count, tokens))


def options_of(form, device):
    return {"coeff": torch.ones(WIDTH, 1, device=device) if form == "power" else None, "form": form, "degree": 1}


@pytest.mark.parametrize("batch, elements", [(1, HUGE), (3, 3 * HUGE // 2)])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_beyond_element_2_to_31_count(form, batch, elements, device):
    """The last tokens, or those of the last of three samples, lie where 32 bits do not reach."""
    before, options = elements // batch // WIDTH + 1, options_of(form, device)
    tail, gate = torch.rand(2, batch, TAIL, WIDTH, device=device).bfloat16().unbind()
    y, state = polynomial_mix(behind_zeros(tail, before), gate, return_state=True, **options)
    expected, expected_state = polynomial_mix(
        tail, gate, state=after_zeros(batch, before, device), return_state=True, **options
    )
    assert expected.min() > 0 and torch.equal(state.count, expected_state.count)
    torch.testing.assert_close(y, expected, rtol=0.01, atol=0)
    torch.testing.assert_close(state.total, expected_state.total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_one_token_repeated_beyond_2_to_31_elements(form, device):
    """Stride 0, so the tensor takes no memory, and a copy of it would: the mean is the feature of that token."""
    tokens, options = HUGE // WIDTH + 2, options_of(form, device)
    row = torch.rand(1, 1, WIDTH, device=device).bfloat16()
    state = polynomial_state(row.expand(1, tokens, WIDTH), **options)
    assert state.count.item() == tokens
    torch.testing.assert_close(state.mean(), polynomial_state(row, **options).mean(), rtol=1e-5, atol=0)


def available(device):
    """Bytes that can be taken; none where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines() if memory.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize(
    "form, mode, heads, long",
    [("power", "whole", 1, "u"), ("product", "whole", 1, "gate"), ("power", "causal", 7, "u")],
)
def test_results_and_gradients_beyond_element_2_to_31(form, mode, heads, long, device):
    """Of 4.3 GB each, that are written one after the other: y, the gradient of u, and that of the gates."""
    needed = (8 if device.type == "cpu" else 24) * 2**30  # a GPU holds the zeros too
    if available(device) < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory, {available(device) / 2**30:.0f} are available")
    before, both = HUGE // WIDTH + 1, mode == "causal"
    u, grad = (torch.rand(2, 1, TAIL, WIDTH, device=device) + 0.5).bfloat16().unbind()  # no sum cancels
    gate = (torch.rand(1, TAIL, WIDTH if heads == 1 else heads, device=device) + 0.5).bfloat16()
    options = {**options_of(form, device), "causal": both, "n_sel_heads": heads}

    def run(u, gate, grad, **state):
        """The last rows of everything. Only what is differentiated outlives the call before it."""
        leaves = [leaf.requires_grad_() for leaf in (u, gate)]
        y = polynomial_mix(*leaves, **options, **state)
        last, edge = y[:, -TAIL:].detach().clone(), torch.autograd.graph.get_gradient_edge(y)
        del y
        return last, *(t[:, -TAIL:].clone() for t in torch.autograd.grad((edge,), leaves, (grad,)))

    prior = {"state": after_zeros(1, before, device)} if long == "u" else {}
    expected = run(u.clone(), gate.clone(), grad, **prior)
    longer = {"u": u, "gate": gate, "grad": grad}
    for name in ("u", "gate", "grad") if both else ("u",) if long == "u" else ("gate", "grad"):
        longer[name] = behind_zeros(longer[name], before)
    for result, wanted in zip(run(**longer), expected, strict=True):
        assert wanted.min() > 0
        torch.testing.assert_close(result, wanted, rtol=0.02, atol=0)
