"""The C++ engine from Python: streams of frames against the reference, on numpy arrays and torch tensors; files; errors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import FLOOR, Case, draw_inputs, move, norm_error, state_dtype

from pom_ext import State, polynomial_update
from pom_ext.engine import Layer, Stream
from pom_ext.ops import reference

CASES = [
    Case(form, degree, dtype=dtype, tokens=tokens, width=16, queries=queries, heads=heads, axes=axes)
    for form, degree, heads, axes in (("product", 2, 1, 0), ("product", 3, 4, 0), ("power", 3, 4, 0), ("power", 2, 1, 2))
    for dtype, tokens, queries in (
        (torch.float32, 40, None), (torch.float64, 7, 3), (torch.bfloat16, 70, None), (torch.float16, 1, 5),
    )
]  # fmt: skip


def layer_of(case, **more):
    dtype = str(case.dtype).removeprefix("torch.")
    return Layer(case.width, form=case.form, degree=case.degree, heads=case.heads, dtype=dtype, **more)


def frame_of(case):
    """Arguments of one frame, torch tensors."""
    inputs = draw_inputs(case)
    given = {name: tensor.detach() for name, tensor in {**inputs.leaves, **inputs.context}.items()}
    if "coeff" in given:
        given["coeff"] = given["coeff"].to(state_dtype(case.dtype))
    return {**given, **inputs.rotaries}


def empty(case, device):
    return torch.empty(case.batch, case.queries or case.tokens, case.channels, dtype=case.dtype, device=device)


def stream_on(device, layers, batch, evaluations=1):
    """A stream in torch's memory, on torch's CUDA stream where it is on a GPU."""
    stream = Stream(
        layers, batch, evaluations, allocate=lambda size: torch.empty(size, dtype=torch.uint8, device=device)
    )
    if device.type == "cuda":
        stream.cuda_stream = torch.cuda.current_stream(device).cuda_stream
    return stream


def on_the_cpu(stream, path):
    """The same stream on the CPU, by its file."""
    stream.save(path)
    copy = Stream(stream.layers, stream.batch, stream.evaluations)
    copy.load(path)
    return copy


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frames_are_those_of_the_reference(case, device, tmp_path):
    stream = stream_on(device, [Layer(3), layer_of(case)], case.batch, 2)
    total, count, coeff = 0.0, 0.0, {}
    for _ in range(3):
        frame = {**frame_of(case), **coeff}
        coeff = {"coeff": frame["coeff"]} if "coeff" in frame else {}
        peeked, y, given = empty(case, device), empty(case, device), move(frame, device)
        assert stream.peek(1, **given, evaluation=1, out=peeked) is peeked
        stream.commit(1, **given, evaluation=1, out=y)
        assert torch.equal(peeked, y)

        exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in frame.items()}
        turn = {
            name: exact[name]._replace(cos=exact[name].cos.double(), sin=exact[name].sin.double())
            for name in ("rotary", "gate_rotary")
            if name in exact
        }
        own = reference.state(
            exact["u"], exact.get("coeff"), form=case.form, degree=case.degree, rotary=turn.get("rotary")
        )
        total, count = total + own[0], count + own[1]
        wanted = reference.readout(
            exact["gate"], total, count, form=case.form, n_sel_heads=case.heads, rotary=turn.get("gate_rotary")
        )
        assert norm_error(y.cpu(), wanted) <= 4 * FLOOR[case.dtype]
    seen = on_the_cpu(stream, tmp_path / "stream.pom")
    sums, residual, counts = seen.state(1, 1)
    assert np.array_equal(counts, count[:, 0].numpy())
    error = np.abs(sums.astype(float) + residual - total[:, 0].numpy()).max() / total.abs().max().item()
    assert error <= 4 * (1e-13 if case.dtype == torch.float64 else 1e-6)
    assert not any(array.any() for array in seen.state(1, 0))


def recorded(call, device):
    """A function that does again what `call` does: on a GPU the replay of a CUDA graph."""
    if device.type == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def test_a_whole_frame_is_recorded_once_and_replayed(device, tmp_path):
    """Two evaluations of two layers and their commit: what changes from frame to frame is in the arrays."""
    cases = [Case("power", 3, tokens=70, width=64, heads=4), Case("product", 2, tokens=70, width=16)]
    layers = [layer_of(case) for case in cases]
    stream, eager = stream_on(device, layers, 2), stream_on(device, layers, 2)
    frames = [move(frame_of(case), device) for case in cases]
    results = [[empty(case, device) for case in cases] for _ in range(2)]

    def whole_frame(stream, out):
        if device.type == "cuda":
            stream.cuda_stream = torch.cuda.current_stream(device).cuda_stream
        for act in (stream.peek, stream.peek, stream.commit):
            for layer, frame in enumerate(frames):
                act(layer, **frame, out=out[layer])

    whole_frame(stream, results[0])  # takes its workspace
    stream.reset()
    replay = recorded(lambda: whole_frame(stream, results[0]), device)
    stream.reset()
    for _ in range(4):
        for frame in frames:
            frame["u"].normal_()
        replay()
        whole_frame(eager, results[1])
        assert all(map(torch.equal, *results))
    ours, theirs = on_the_cpu(stream, tmp_path / "one.pom"), on_the_cpu(eager, tmp_path / "other.pom")
    assert (tmp_path / "one.pom").read_bytes() == (tmp_path / "other.pom").read_bytes()
    assert ours.state(1)[2].tolist() == theirs.state(1)[2].tolist() == [280, 280]


def test_the_engine_and_the_operation_of_torch_are_the_same_bits():
    case = Case("power", 3, tokens=130, width=64, heads=4)
    stream, state = Stream([layer_of(case)], case.batch), State.empty(case.batch, case.channels)
    for _ in range(3):
        frame = frame_of(case)
        y = stream.commit(0, **{name: tensor.numpy() for name, tensor in frame.items()})
        wanted = polynomial_update(state=state, form=case.form, degree=case.degree, n_sel_heads=case.heads, **frame)
        assert isinstance(y, np.ndarray) and np.array_equal(y, wanted.numpy())
    for ours, theirs in zip(stream.state(0), (state.total[:, 0], state.residual[:, 0], state.count[:, 0])):
        assert np.array_equal(ours, theirs.numpy())


def test_any_strides_are_taken_as_they_are():
    case = Case("product", 2, tokens=6, width=8)
    frame = frame_of(case)
    wide = np.zeros((case.batch, 6, 40), np.float32)
    wide[:, :, 5 : 5 + case.channels] = frame["u"].numpy()
    gate = frame["gate"][:, :1].expand(-1, 6, -1)
    one, other = Stream([layer_of(case)], case.batch), Stream([layer_of(case)], case.batch)
    y = one.peek(0, wide[:, :, 5 : 5 + case.channels], gate)
    assert np.array_equal(y, other.peek(0, frame["u"], gate.contiguous()))


def test_a_whole_layer():
    """By the built-in product, against the layer of the package."""
    from pom_ext import PoM

    layer = PoM(24, 3, 2, form="power", n_sel_heads=4)
    weight = torch.cat([layer.context_proj.weight, layer.gate_proj.weight]).detach()
    bias = torch.cat([torch.zeros(layer.state_width), layer.gate_proj.bias]).detach()
    stream, state = Stream([Layer(48, "power", 3, 4)], batch=2), None
    arguments = {"in_bias": bias, "coeff": layer.coeff.detach()}
    for _ in range(3):
        x = torch.randn(2, 10, 24)
        with torch.no_grad():
            wanted, state = layer(x, state=state, return_state=True)
        peeked = stream.step(0, x, weight, layer.out_proj.weight.detach(), **arguments)
        y = stream.step(0, x, weight, layer.out_proj.weight.detach(), **arguments, commit=True)
        assert np.array_equal(peeked, y)
        assert norm_error(torch.from_numpy(y), wanted) < 1e-6


def stream_of_three(case, path=None):
    stream = Stream([layer_of(case, kept=10), layer_of(case)], case.batch, 2)
    for evaluation in (0, 1, 0):
        stream.commit(1, **frame_of(case), evaluation=evaluation)
    stream.kept(0, 1)[:] = np.arange(10)
    return stream


CASE = Case("power", 3, tokens=9, width=16, heads=4)


def test_forks_go_their_own_way():
    stream = stream_of_three(CASE)
    fork, frame = stream.fork(), frame_of(CASE)
    ours = stream.commit(1, **frame)
    stream.kept(0, 1)[:] = 0
    assert np.array_equal(fork.commit(1, **frame), ours) and np.array_equal(fork.kept(0, 1), np.arange(10))
    stream.rewind(fork)
    assert np.array_equal(stream.kept(0, 1), np.arange(10))
    stream.reset()
    assert not stream.state(1)[0].any() and not stream.kept(0, 1).any()
    assert fork.state(1)[0].any()


def test_a_file_goes_on_bit_for_bit(tmp_path):
    stream, frame = stream_of_three(CASE), frame_of(CASE)
    stream.save(tmp_path / "stream.pom")
    loaded = Stream(stream.layers, CASE.batch, 2)
    loaded.load(tmp_path / "stream.pom")
    assert np.array_equal(loaded.commit(1, **frame), stream.commit(1, **frame))
    assert np.array_equal(loaded.kept(0, 1), np.arange(10))
    assert [path.name for path in tmp_path.iterdir()] == ["stream.pom"]


def test_bad_files_leave_the_stream_as_it_was(tmp_path):
    stream, path = stream_of_three(CASE), tmp_path / "stream.pom"
    stream.save(path)
    good, before = path.read_bytes(), stream.state(1)
    flipped = good[:100] + bytes([good[100] ^ 4]) + good[101:]
    later = good[:8] + b"\2" + good[9:]
    for bad, word in ((flipped, "damaged"), (good[:-1], "truncated"), (b"", "not a saved"), (later, "later version")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"path: .*stream.pom.*{word}"):
            stream.load(path)
    path.write_bytes(good)
    other = Stream([layer_of(CASE)], CASE.batch)
    with pytest.raises(ValueError, match="other layers"):
        other.load(path)
    with pytest.raises(ValueError, match="other layers"):
        other.rewind(stream)
    with pytest.raises(FileNotFoundError):
        stream.load(tmp_path / "none")
    for now, then in zip(stream.state(1), before):
        assert np.array_equal(now, then)


def test_arguments_are_refused_by_name():
    stream, frame = Stream([layer_of(CASE)], CASE.batch), frame_of(CASE)

    def refused(error, match, layer=0, **change):
        with pytest.raises(error, match=match):
            stream.commit(layer, **{**frame, **change})

    u, gate = frame["u"], frame["gate"]
    refused(TypeError, "u: expected an array with __dlpack__.*got list", u=[1.0])
    refused(TypeError, "u: expected float32, got float64", u=u.double())
    refused(TypeError, "gate: expected float32, got bfloat16", gate=gate.bfloat16())
    refused(ValueError, r"u: expected shape \(2, 9, 16\), got \(2, 9, 15\)", u=u[..., :15])
    refused(ValueError, r"u: expected 3 dimensions, got shape \(2, 144\)", u=u.flatten(1))
    refused(ValueError, r"u: expected shape \(2, 9, 16\), got \(1, 9, 16\)", u=u[:1])
    refused(ValueError, r"gate: expected shape \(2, 9, 4\), got \(2, 9, 16\)", gate=u)
    refused(ValueError, "u: expected channels side by side.*contiguous", u=u.mT.contiguous().mT)
    refused(ValueError, r"coeff: expected shape \(16, 3\)", coeff=frame["coeff"][:, :2])
    refused(ValueError, "pointer .* is null", coeff=None)
    refused(ValueError, r"weight: expected shape \(2, 9\)", weight=torch.ones(9))
    refused(ValueError, r"out: expected shape \(2, 9, 16\)", out=torch.empty(2, 9, 17))
    refused(ValueError, "out: expected a contiguous array", out=torch.empty(2, 1, 16).expand(2, 9, 16))
    refused(ValueError, "overlaps", out=u)
    refused(IndexError, "no such layer", layer=1)
    refused(IndexError, "no such layer or evaluation", evaluation=1)
    refused(TypeError, r"rotary: expected a tuple \(cos, sin, axes\)", rotary=torch.ones(3))
    assert not stream.state(0)[2].any()
    half = Stream([Layer(8, dtype="bfloat16")])
    with pytest.raises(ValueError, match="out: expected an array to write to"):
        half.peek(0, torch.ones(1, 2, 16, dtype=torch.bfloat16), torch.ones(1, 2, 16, dtype=torch.bfloat16))


def test_shapes_are_refused_by_name():
    for change, match in (
        ({"form": "sum"}, "form: expected one of product, power, got 'sum'"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
        ({"degree": 17}, "degree: expected 1 to 16"),
        ({"heads": 5}, "does not divide"),
    ):
        with pytest.raises(ValueError, match=match):
            Stream([Layer(**{"width": 8, **change})])
    for arguments, match in (
        (([],), "layers: expected at least one"),
        (([Layer(8)], 0), "batch: expected an integer of at least 1, got 0"),
        (([Layer(8)], 1, 1.5), "evaluations: expected an integer of at least 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            Stream(*arguments)


def test_memory_comes_from_the_caller():
    given = []

    def allocate(size):
        given.append(torch.full((size,), 7, dtype=torch.uint8))
        return given[-1]

    stream, other = Stream([layer_of(CASE)], CASE.batch, allocate=allocate), Stream([layer_of(CASE)], CASE.batch)
    frame = frame_of(CASE)
    assert np.array_equal(stream.commit(0, **frame), other.commit(0, **frame))
    assert len(given) == 2  # the stream's and a workspace
    stream.commit(0, **frame)
    assert len(given) == 2
    with pytest.raises(ValueError, match="allocate: expected a function"):
        Stream([Layer(8)], allocate=lambda size: np.empty(size // 2, np.uint8))


def test_no_torch_is_needed():
    """The engine alone, in a process where importing torch fails."""
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
from pom_ext.engine import Layer, Stream
stream = Stream([Layer(8)])
ones = np.ones((1, 4, 16), np.float32)
assert stream.commit(0, ones, ones).shape == (1, 4, 16) and stream.state(0)[2] == 4
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        (sys.executable, "-c", program),
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
