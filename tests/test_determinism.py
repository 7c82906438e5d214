"""Bit-identical results, whatever runs beside them, and memory that does not grow with the tokens."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import FORMS, MODES, Case, draw_inputs, run_op

from pom_ext import State, polynomial_update

LONG = ("whole", "weight", "causal", "frames_unequal")


def assert_bit_identical(results, others):
    for name, result in results.items():
        assert torch.equal(result, others[name]), name


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


def sample(inputs, index):
    """The call with one sample of the batch."""

    def pick(tensors):
        return {name: t if name == "coeff" else t[index : index + 1] for name, t in tensors.items()}

    context = {name: value for name, value in inputs.context.items() if name not in ("weight", "mask")}
    weights = {name: value for name, value in inputs.context.items() if name in ("weight", "mask")}
    return replace(
        inputs, leaves=pick(inputs.leaves), output_grads=pick(inputs.output_grads), context=context | pick(weights)
    )


@pytest.mark.parametrize("tokens, width", [(7, 33), (5_000, 9)])
@pytest.mark.parametrize("mode", (*LONG, "cu_seqlens", "mask"))
@pytest.mark.parametrize("form", FORMS)
def test_batch_neighbours_change_nothing(form, mode, tokens, width, device):
    queries = 3 if mode == "mask" else None
    inputs = draw_inputs(Case(form, 2, mode, batch=4, tokens=tokens, width=width, queries=queries))
    together = run_op(inputs, device)
    for index in range(4):
        alone = run_op(sample(inputs, index), device)
        own = {name: result[index : index + 1] for name, result in together.items() if name != "grad coeff"}
        assert_bit_identical(own, alone)


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
