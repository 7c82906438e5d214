"""The frame step as a package: equal to the model, with the compiled operations in it, and usable without Python."""

import json
import subprocess
import zipfile
from contextlib import nullcontext

import pytest
import torch
from cpp_programs import ROOT, call
from video_cases import HYBRID, small

from pom_ext import _C
from pom_ext.diffusion import FlowMatching, MeanFlow, NoisePrediction
from pom_ext.export import export_frame_step, trace_frame_step
from pom_ext.media.frames import to_pixels
from pom_ext.streaming import VideoStream
from pom_ext.streaming.stream import DRAWN

# Operations of a layer: the readout before the output projection, or folded into it where that is less work.
DIRECT, FOLDED = ["project_state", "project_readout"], ["project_state", "folded_readout"]
STEPS = {  # arguments of the model, of its start, and what the graph holds
    "product-space": (
        {"mixer": "product", "positions": "space", "n_classes": 4},
        {"batch": 2, "size": (8, 4)},
        2 * DIRECT,
    ),
    "product-sincos-plain": ({"mixer": "product", "local_conv": False}, {}, 2 * DIRECT),
    "power-sincos-window": ({"mixer": "power"}, {"window": 3}, 2 * FOLDED),
    "power-rotary-plain": ({"positions": "rotary", "n_heads": 1, "local_conv": False}, {"batch": 2}, 2 * DIRECT),
    "power-rotary-classes": ({"positions": "rotary", "n_heads": 6, "dim": 48, "n_classes": 2}, {}, 2 * DIRECT),
    "both-space-decay": (
        {"mixer": ["product", "power"], "positions": "space"},
        {"batch": 2, "decay": 0.75},
        DIRECT + FOLDED,
    ),
    "split-sink-blocks": (
        {"read": "split", "fade": "gated", "sink": 2, "space_groups": 2, "size": (4, 8), "local_conv": ["frame", 1]},
        {"batch": 2},
        ["project_state", "linear"] * 2,  # the fade; the gates of the four reads are one product of torch
    ),
    "split-hybrid": (
        {"read": "split", "mixer": ["attention+product", "attention+power"], "local_conv": None, "positions": "space"},
        {"window": 3},
        ["project_state", *["linear", "readout"] * 2, "linear", "project_state"],  # a gate per channel, and per head
    ),
}
STEP = pytest.mark.parametrize(("model", "start", "operations"), STEPS.values(), ids=STEPS)

BOTH = {"mixer": ["product", "power"], "positions": "space", "n_classes": 4}
PACKAGES = {  # arguments of the model, of its start, and what it was trained for
    "both": (BOTH, {"batch": 2, "size": (8, 4)}, {"objective": FlowMatching(2.0)}),
    "rotary": ({"positions": "rotary", "n_heads": 1, "local_conv": False}, {"decay": 0.75}, {"context": "shared"}),
    "sincos": ({"mixer": "product", "n_layers": 1}, {"window": 3}, {"objective": NoisePrediction(3.0)}),
}
PACKAGED = {"both": DIRECT + FOLDED, "rotary": 2 * DIRECT, "sincos": DIRECT}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """File, model, arguments of its start and of its training by name; compiled when first asked for."""
    folder, written = tmp_path_factory.mktemp("aoti"), {}

    def get(name):
        if name not in written:
            model, start, training = PACKAGES[name]
            model = small(**model).float()
            export_frame_step(model, folder / f"{name}.pt2", **start, **training)
            written[name] = folder / f"{name}.pt2", model, start, training
        return written[name]

    return get


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ program, built as a stranger would."""
    build = tmp_path_factory.mktemp("build")
    flags = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"]
    call("cmake", "-S", ROOT / "examples/aoti", "-B", build, *flags)
    call("cmake", "--build", build)
    return build / "frames"


def run(*command):
    """Exit status, standard output and standard error of a program that knows nothing of the Python here."""
    done = subprocess.run([str(word) for word in command], env={}, check=False, capture_output=True)
    return done.returncode, done.stdout, done.stderr.decode()


def follow(step, inputs, model, start, frames=6):
    """Pairs of tensors: what `step` gives with its state carried along, and the model with its past."""
    past, state = model.start(**start), [t for name, t in inputs.items() if name not in ("frame", "time", "labels")]
    for number in range(frames):
        frame, time = torch.randn_like(inputs["frame"]), 900 * torch.rand_like(inputs["time"])
        labels = {name: torch.randint(model.n_classes + 1, t.shape) for name, t in inputs.items() if name == "labels"}
        with torch.no_grad():
            expected, past = model(frame, time, **labels, frame_causal=True, past=past, return_past=True)
            out, *state = step(frame, time, *labels.values(), *state)
        yield out, expected
        numbers = [] if model.positions == "space" else [torch.tensor(number + 1)]
        remembered = [t for name, t in past.state_dict().items() if name not in ("seen", "forgetting")]
        yield from zip(state, numbers + remembered, strict=True)


@STEP
def test_traced_step_carries_its_state_as_the_model_its_past(model, start, operations):
    """In float64, so that nothing but rounding of the last digits can hide."""
    model = small(**model)
    program, inputs = trace_frame_step(model, **start)
    assert not any(t.any() for t in inputs.values())
    for got, expected in follow(program.module(), inputs, model, start):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert got.is_contiguous()
    targets = [str(node.target) for node in program.graph.nodes]
    assert [target.split(".")[1] for target in targets if target.startswith("pom_ext.")] == operations


@pytest.mark.parametrize("name", PACKAGES)
def test_package_equals_the_model(name, packages):
    path, model, start, _ = packages(name)
    inputs = trace_frame_step(model, **start)[1]
    for got, expected in follow(torch._inductor.aoti_load_package(str(path)), inputs, model, start):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PACKAGES)
def test_package_calls_the_compiled_operations(name, packages):
    with zipfile.ZipFile(packages(name)[0]) as files:
        (calls,) = (files.read(entry) for entry in files.namelist() if entry.endswith(".wrapper.json"))
    called = [node["node"]["target"] for node in json.loads(calls)["nodes"]]
    assert called == [f"pom_ext::{operation}" for operation in PACKAGED[name]]


def test_package_says_what_it_is(packages):
    path = packages("both")[0]
    metadata = torch._inductor.aoti_load_package(str(path)).get_metadata()
    expected = {"n_classes": "4", "objective": "flow", "shift": "2.0", "context": "clean"}
    assert metadata | expected == metadata
    lines = metadata["inputs"].split("\n")
    assert lines[:4] == ["frame float32 2 3 2 8 4", "time float32 2", "labels int64 2", "0.total float32 2 1 64"]
    assert lines[-2:] == ["0.tail float32 2 2 8 16", "1.tail float32 2 2 8 16"] and len(lines) == 3 + 2 * 4


@pytest.mark.parametrize("name", ["both", "rotary"])
def test_program_draws_the_frames_of_the_stream(name, packages, program, tmp_path):
    path, model, start, training = packages(name)
    frames, steps, label = 5, 3, 2 if model.n_classes else 0
    labels = {"labels": [label] * start["batch"]} if model.n_classes else {}
    stream = VideoStream(model, steps=steps, seed=7, **labels, **start, **training)
    noise, pictures = [], []
    for _ in range(frames):
        noise.append(stream._noise(1, DRAWN))
        for videos in stream.next().unbind(2):  # (B, C, H, W)
            pictures.append(to_pixels(torch.cat(list(videos), dim=2)))
    (tmp_path / "noise").write_bytes(torch.stack(noise).numpy().tobytes())
    status, out, error = run(program, path, _C.__file__, frames, steps, label, tmp_path / "noise")
    assert status == 0, error
    drawn, expected = torch.frombuffer(bytearray(out), dtype=torch.uint8).int(), torch.stack(pictures).flatten().int()
    assert drawn.shape == expected.shape and expected.float().std() > 20
    assert (drawn - expected).abs().max() <= 1 and (drawn == expected).float().mean() > 0.99


def test_program_draws_noise_of_its_own(packages, program):
    """Other noise every time."""
    (status, out, _), (_, other, _) = (run(program, packages("both")[0], _C.__file__, 3, 1) for _ in range(2))
    assert status == 0 and len(out) == 3 * 2 * (8 * 4 * 2) * 3 and out != other


def test_program_ends_and_tidies_up_when_nobody_reads(packages, program, tmp_path):
    command = [program, packages("both")[0], _C.__file__, str(10**9), "1"]
    with subprocess.Popen(command, env={"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE) as running:
        assert len(running.stdout.read(100)) == 100
        held = list(tmp_path.iterdir())
        running.stdout.close()
        assert running.wait() == 0
    assert held and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        (None, [], "usage: "),
        ("both", [], "usage: "),
        ("both", ["none.so"], "library: none.so"),
        ("both", [_C.__file__, "many"], "expected a number, got many"),
        ("both", [_C.__file__, 1, 0], "steps: expected at least 1, got 0"),
        ("both", [_C.__file__, 1, 1, 5], "label: expected 0 to 4"),
        ("both", [_C.__file__, 1, 1, 0, "/dev/null"], "noise: /dev/null has none for frame 0"),
        ("sincos", [_C.__file__], "package: expected flow matching, got 'noise'"),
    ],
)
def test_program_says_what_is_wrong(package, arguments, message, packages, program):
    given = [] if package is None else [packages(package)[0]]
    status, out, error = run(program, *given, *arguments)
    assert status == 1 and not out and error.startswith(message) and len(error.splitlines()) == 1


def test_positions_that_end_stop_the_step(packages):
    """At the length of the training, as the model itself; not with a frame out of place."""
    path, model, start, _ = packages("sincos")
    program, inputs = trace_frame_step(model, **start)
    last = model.length // model.patch[0] - 1
    for step in (program.module(), torch._inductor.aoti_load_package(str(path))):
        for frames, ends in ((last, False), (last + 1, True), (-1, True)):
            given = (inputs | {"frames": torch.tensor(frames)}).values()
            with pytest.raises(RuntimeError, match="u0") if ends else nullcontext():
                step(*given)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ({"mixer": HYBRID}, {}, ValueError, "model: .* attention: its memory grows"),
        ({"two_times": True}, {}, ValueError, "model: expected two_times=False, got True; a frame step has one time"),
        ({}, {"objective": MeanFlow()}, ValueError, "model: objective='meanflow' needs a model with two_times=True"),
        ({}, {"objective": MeanFlow(), "context": "shared"}, ValueError, "context: expected clean with MeanFlow"),
        ({"text_dim": 5}, {}, ValueError, "model: expected one without text, got text_dim=5"),
        (None, {}, TypeError, "model: expected a VideoDiT, got Linear"),
        ({}, {"path": "clip.so"}, ValueError, "path: expected a name that ends in .pt2"),
        ({}, {"batch": 0}, ValueError, "batch: expected an integer of at least 1, got 0"),
        ({}, {"size": (5, 4)}, ValueError, "size: expected multiples of the patch"),
        ({}, {"window": -1}, ValueError, "window: expected an integer of at least 0, got -1"),
        ({}, {"decay": 0.0}, ValueError, "decay: expected a number above 0"),
        ({"read": "split", "fade": "head"}, {"window": 2}, ValueError, "window: expected 0, got 2; .* fades"),
        ({}, {"context": "noisy"}, ValueError, "context: expected one of clean, shared"),
    ],
)
def test_refusals_leave_no_file(model, options, error, message, tmp_path):
    options = dict(options)
    model, path = torch.nn.Linear(1, 1) if model is None else small(**model), options.pop("path", "clip.pt2")
    with pytest.raises(error, match=message):
        export_frame_step(model, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_failure_leaves_the_old_package(tmp_path, monkeypatch):
    def fail(program, *, package_path, inductor_configs):
        package_path.write(b"half of it")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    path = tmp_path / "clip.pt2"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk full"):
        export_frame_step(small(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
