"""Bit-identical results, whatever runs beside them and however torch is set, and memory that does not grow with the tokens."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import FORMS, MODES, Case, draw_inputs, op_function, run_op

from pom_ext import PoM, State, polynomial_mix, polynomial_update

DTYPES = (torch.float32, torch.bfloat16)
LONG = ("whole", "weight", "causal", "frames_unequal")


def assert_bit_identical(results, others):
    for name, result in results.items():
        assert torch.equal(result, others[name]), name


def inputs_of(form, mode, dtype=torch.float32, **sizes):
    """A case with whatever the mode allows: a state from before, rotary positions, a gate for several channels."""
    prior = mode.split("+")[0] not in ("mask", "cu_seqlens")
    extras = {"axes": 1} if form == "power" else {"heads": 3}
    sizes = {"batch": 3, "tokens": 130, "width": 33, "queries": 3 if mode == "mask" else None, **sizes}
    return draw_inputs(Case(form, 3, mode, dtype, **sizes, prior=prior, **extras))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_runs_are_bit_identical(form, mode, device):
    inputs = draw_inputs(Case(form, 3, mode, batch=3, tokens=300, width=33))
    assert_bit_identical(run_op(inputs, device), run_op(inputs, device))


@pytest.fixture
def threads():
    """Sets torch's threads, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch, tokens, width", [(1, 20_000, 17), (3, 700, 33), (9, 5, 513)])
@pytest.mark.parametrize("mode", LONG)
@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_nothing(form, mode, batch, tokens, width, threads):
    inputs = draw_inputs(Case(form, 2, mode, batch=batch, tokens=tokens, width=width))
    threads(1)
    alone = run_op(inputs)
    for number in (2, 3):
        threads(number)
        assert_bit_identical(run_op(inputs), alone)


def pick(inputs, samples):
    """The call with these samples of the batch, in this order."""

    def of(tensors):
        return {name: t if name == "coeff" else t[samples] for name, t in tensors.items()}

    weights = {name: value for name, value in inputs.context.items() if name in ("weight", "mask")}
    return replace(
        inputs, leaves=of(inputs.leaves), context=inputs.context | of(weights), output_grads=of(inputs.output_grads),
        prior_residual=inputs.prior_residual[samples], prior_count=inputs.prior_count[samples],
    )  # fmt: skip


def of_samples(results, samples):
    """Results of these samples. The gradient of the coefficients is the sum over all of them, and left out."""
    return {name: result[samples] for name, result in results.items() if name != "grad coeff"}


@pytest.mark.parametrize(
    "tokens, width, dtype", [(7, 33, torch.float32), (130, 33, torch.bfloat16), (5000, 9, torch.float32)]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_the_same_in_any_batch_and_place(form, mode, tokens, width, dtype, device):
    inputs = inputs_of(form, mode, dtype, batch=5, tokens=tokens, width=width)
    expected = run_op(inputs, device)
    for samples in ([0], [4], [3, 1], [2, 2, 0], [4, 3, 2, 1, 0]):
        assert_bit_identical(of_samples(expected, samples), run_op(pick(inputs, samples), device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_query_does_not_know_the_others(form, dtype, device):
    """More queries than tokens or fewer: the answer to each, and the gradient of its gate, are the same bits."""
    inputs = draw_inputs(Case(form, 3, "whole", dtype, tokens=7, queries=130, width=33))
    together = run_op(inputs, device)
    for queries in (slice(0, 1), slice(64, 66), slice(3, 130)):
        gate, grad = inputs.leaves["gate"][:, queries], inputs.output_grads["y"][:, queries]
        alone = replace(inputs, leaves=inputs.leaves | {"gate": gate}, output_grads=inputs.output_grads | {"y": grad})
        expected = {name: together[name][:, queries] for name in ("y", "grad gate")}
        assert_bit_identical(expected | {"state": together["state"]}, run_op(alone, device))


@pytest.fixture
def deterministic():
    """Deterministic algorithms alone, for a call. Outputs that torch allocates are then filled with NaN first."""

    def call(function, *arguments):
        torch.use_deterministic_algorithms(True)
        try:
            return function(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    assert torch.utils.deterministic.fill_uninitialized_memory
    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_deterministic_algorithms_change_no_bit(form, mode, dtype, device, deterministic):
    inputs = inputs_of(form, mode, dtype)
    assert_bit_identical(deterministic(run_op, inputs, device), run_op(inputs, device))


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_layers_and_streams_change_no_bit(form, deterministic):
    """On the CPU: for a GPU's matrix products torch wants an environment variable."""
    layer, x = PoM(13, 3, form=form, rope="1d" if form == "power" else None), torch.randn(3, 70, 13)
    u, gate = torch.randn(2, 3, 70, layer.state_width).unbind()

    def run():
        y, state = layer(x, return_state=True)
        grads = torch.autograd.grad(y.sum() + state.mean().sum(), list(layer.parameters()))
        with torch.no_grad():
            results = {"y": y, **dict(enumerate(grads)), "next": layer(x, state=state)}
            results["update"] = polynomial_update(u, gate, state, layer.coeff, form=form, degree=3)
        return results | state.state_dict()

    assert_bit_identical(deterministic(run), run())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_inference_mode_changes_no_bit(form, mode, device):
    inputs = inputs_of(form, mode)
    leaves = {name: leaf.to(device) for name, leaf in inputs.leaves.items()}
    expected = op_function(inputs, device)(**leaves)
    with torch.inference_mode():
        assert_bit_identical(expected, op_function(inputs, device)(**leaves))


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_in_and_out_of_inference_mode(form, device):
    """States made in it are read and written outside, and the other way round."""
    frames, gate = torch.randn(4, 2, 5, 12, device=device), torch.randn(2, 3, 12, device=device)
    coeff = torch.randn(12, 2, device=device) if form == "power" else None

    def stream(modes):
        state, outputs = State.empty(2, 12, device=device), {}
        for i, (frame, inference) in enumerate(zip(frames, modes, strict=True)):
            with torch.inference_mode(inference):
                _, state = polynomial_mix(frame, gate, coeff, form=form, degree=2, state=state, return_state=True)
                outputs[i] = polynomial_update(frame, gate, state, coeff, form=form, degree=2)
        return outputs | state.state_dict()

    assert_bit_identical(stream([False] * 4), stream([True, False, True, False]))


@pytest.mark.parametrize("form", FORMS)
def test_updates_are_bit_identical(form, device):
    """A stream of a short, a tiny and a long frame, twice."""
    inputs = [draw_inputs(Case(form, 3, "whole", batch=3, tokens=tokens, width=33)) for tokens in (300, 1, 1500)]

    def stream():
        state, results = State.empty(3, inputs[0].case.channels, device=device), {}
        for i, frame in enumerate(inputs):
            frame = {name: leaf.to(device) for name, leaf in frame.leaves.items()}
            results[f"y {i}"] = polynomial_update(**frame, state=state, form=form, degree=3)
        return results | state.state_dict()

    assert_bit_identical(stream(), stream())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_updates_take_no_memory(device):
    """10,000 frames later a stream holds what it held after the first ones."""
    frame = torch.randn(1, 16, 256, device=device)
    state = State.empty(1, 256, device=device)

    def held(frames):
        for _ in range(frames):
            polynomial_update(frame, frame, state, form="product", degree=2)
        if device.type == "cuda":
            return torch.cuda.memory_allocated()
        resident = Path("/proc/self/statm").read_text().split()[1]
        return int(resident) * os.sysconf("SC_PAGE_SIZE")

    before = held(1000)
    assert held(10_000) - before < 2**20
    assert state.count.item() == 11_000 * 16


MEMORY = """
import torch
from pom_ext import polynomial_mix, polynomial_state

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024

tokens, channels, dtype, form = {tokens}, 1024, torch.{dtype}, "{form}"
coeff = torch.ones(channels, 3) if form == "power" else None
degree = 3 if form == "power" else 2

def run(u):
    gate = u[:, : {queries}] if {queries} else u
    polynomial_state(u, coeff, form=form, degree=degree, {state_options})
    return polynomial_mix(u, gate, coeff, form=form, degree=degree, {options})

u = torch.full((1, tokens, channels), 0.5, dtype=dtype)
run(u[:, :64])  # loads what is loaded once
before = peak()
y = run(u)
print(peak() - before - (y.nbytes if y.shape[1] == tokens else 0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "form, dtype, options",
    [
        ("power", "float32", "n_sel_heads=1"),
        ("product", "bfloat16", "n_sel_heads=1"),
        ("power", "bfloat16", "weight=torch.ones(1, u.shape[1])"),
        ("power", "float32", "frames=u.shape[1] // 4"),
        ("product", "float32", "causal=True"),
        ("power", "bfloat16", "causal=True"),
    ],
)
def test_memory_does_not_grow_with_the_tokens(form, dtype, options):
    """256 MiB of u: the forward needs its output and the state, and at most 32 MiB beside."""
    linked = "frames" in options or "causal" in options
    script = MEMORY.format(
        tokens=65536 if dtype == "float32" else 131072,
        dtype=dtype,
        form=form,
        queries=0 if linked else 16,
        options=options,
        state_options=options if "weight" in options or "frames" in options else "",
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(output) < 32 * 2**20, f"{int(output) / 2**20:.0f} MiB"
