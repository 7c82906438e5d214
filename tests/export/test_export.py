"""Models written for the engine, and the program of examples/ that draws video from them without torch: its frames are
those of the Python stream, and files that it cannot draw from are refused."""

import json
import os
import subprocess

import av
import pytest
import torch
from command import assert_fails
from command import call as command
from cpp_programs import CXX, ROOT, call
from safetensors.torch import load_file
from video_cases import TEXT_DIM, small

from pom_ext.diffusion import FlowMatching
from pom_ext.export import export_model
from pom_ext.media.frames import to_pixels
from pom_ext.models import ImageDiT
from pom_ext.models.checkpoint import save_checkpoint
from pom_ext.streaming import VideoStream

SHIFT, STEPS = 0.7, 3
# Threads that spin while they wait are slow on a machine in use.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
COUNTS_ALLOCATIONS = """
#include <stdio.h>
#include <stdlib.h>
void* __libc_malloc(size_t);
static long count;
void* malloc(size_t bytes) { __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED); return __libc_malloc(bytes); }
__attribute__((destructor)) static void report(void) { fprintf(stderr, "allocations: %ld\\n", count); }
"""


@pytest.fixture(scope="module")
def program(cmake_library, tmp_path_factory):
    """The program as a stranger builds it: with the library installed somewhere, found by CMake."""
    _, prefix, flags = cmake_library
    build = tmp_path_factory.mktemp("stream")
    flags = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Werror", *flags[1:]]
    call("cmake", "-S", ROOT / "examples", "-B", build, "-G", "Ninja", *flags)
    call("cmake", "--build", build)
    return build / "stream"


def run(program, *arguments, **options):
    words = [str(word) for word in (program, *arguments)]
    return subprocess.run(words, capture_output=True, check=False, **{"env": ENVIRONMENT, **options})


def frames_of(program, path, shape, count, *options):
    """The numbers of `count` frames of the shape (C, t, H, W), one after the other: (C, count * t, H, W)."""
    done = run(program, path, "--steps", STEPS, "--format", "f32", "--frames", count, *options)
    assert done.returncode == 0, done.stderr.decode()
    frames = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(count, *shape)
    return torch.cat(frames.unbind(), dim=1)


def refused(done, *texts):
    message = done.stderr.decode()
    assert done.returncode == 1 and message.startswith("error: ") and message.count("\n") == 1, message
    assert not done.stdout
    for text in texts:
        assert text in message


def write(path, model, *, context="clean", objective="flow"):
    """A checkpoint as training writes it."""
    train = {"context": context, "objective": objective, "shift": SHIFT}
    settings = {"architecture": type(model).__name__, "model": model.config, "train": train, "data": {"fps": 12.5}}
    save_checkpoint(path, {"ema": model.state_dict()}, settings)
    return path


def exported(folder, *, context="clean", **changes):
    """A small model in float64, whose weights are float32 numbers, and its file for the engine."""
    model = small(**{"positions": "space", **changes}).float()
    path = folder / "engine.safetensors"
    export_model(write(folder / "model.safetensors", model, context=context), path)
    return model.double(), path


def shape_of(model):
    return model.in_channels, model.patch[0], *model.size


CASES = {
    "product": {},
    "power": {"mixer": "power"},
    "mixed": {"mixer": ["power", "product", "power"], "degree": 4, "expand": 1, "in_channels": 1},
    "one video frame": {"patch": (1, 2, 2), "size": (6, 4), "in_channels": 2},
    "one row": {"size": (2, 6), "mixer": "power", "n_heads": 1},
    "no convolution": {"local_conv": False},
    "small tails": {"local_conv": ["clip", None, "frame", 1], "mixer": ["power", "product", "power", "product"]},
    "classes": {"n_classes": 4, "labels": [3]},
    "actions": {"n_classes": 4, "labels": [1, 1, 0, 4, 2], "mixer": "power"},
    "guidance": {"n_classes": 4, "labels": [2, 0], "guidance": 1.7, "mixer": ["product", "power"]},
    "context noise": {"context_noise": 0.3},
    "shared noise": {"context": "shared", "n_classes": 4, "labels": [0, 3], "guidance": 2.0},
}


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_the_python_stream(name, device, program, tmp_path):
    case = {"mixer": "product", **CASES[name]}
    labels, guidance = case.pop("labels", None), case.pop("guidance", 1.0)
    context, context_noise = case.pop("context", "clean"), case.pop("context_noise", 0.0)
    model, path = exported(tmp_path, context=context, **case)
    options = {"context": context, "context_noise": context_noise, "steps": STEPS, "guidance": guidance}
    labels_of_one = None if labels is None else labels[:1]
    stream = VideoStream(model, labels_of_one, objective=FlowMatching(SHIFT), **options)
    noise, draw = [], stream._noise

    def noted(*arguments):  # in the order in which it is needed, and as the program reads it
        noise.append(draw(*arguments).float())
        return noise[-1].double()

    stream._noise = noted
    expected = [stream.next(None if labels is None else [labels[min(i, len(labels) - 1)]])[0] for i in range(5)]
    (tmp_path / "noise").write_bytes(b"".join(frame.numpy().tobytes() for frame in noise))

    options = ["--noise", tmp_path / "noise", "--guidance", guidance, "--context-noise", context_noise]
    options += ["--cuda"] * (device.type == "cuda")
    if labels is not None:
        options += ["--label", ",".join(map(str, labels))]
    given = frames_of(program, path, shape_of(model), 5, *options)
    torch.testing.assert_close(given.double(), torch.cat(expected, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_the_numbers(channels, program, tmp_path):
    model, path = exported(tmp_path, mixer="power", in_channels=channels)
    numbers = frames_of(program, path, shape_of(model), 3)
    pictures = [to_pixels(frame) for frame in numbers.unbind(1)]
    options = [path, "--steps", STEPS, "--frames", 3, "--format"]

    done = run(program, *options, "rgb")
    assert done.stdout == b"".join(picture.numpy().tobytes() for picture in pictures)
    assert b"ffplay -f rawvideo -pixel_format rgb24 -video_size 6x4 -framerate 12.5 -\n" in done.stderr
    assert b"\n3 frames, " in done.stderr

    done = run(program, *options, "ppm")
    assert b"ffplay -framerate 12.5 -\n" in done.stderr
    (tmp_path / "video").write_bytes(done.stdout)
    with av.open(
        str(tmp_path / "video"), options={"framerate": "12.5"}
    ) as file:  # as ffplay opens it: by what is in it
        assert file.streams.video[0].average_rate == 12.5
        shown = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    assert len(shown) == 6 and all(torch.equal(*pair) for pair in zip(shown, pictures, strict=True))

    done = run(program, *options, "none")
    assert done.returncode == 0 and not done.stdout and b"ffplay" not in done.stderr


@pytest.mark.parametrize("guidance", [1, 1.5])
def test_a_kept_stream_goes_on(guidance, device, program, tmp_path):
    model, path = exported(tmp_path, mixer=["product", "power"], n_classes=4)
    options = ["--label", 2, "--seed", 3, "--guidance", guidance, "--context-noise", 0.2]
    options += ["--cuda"] * (device.type == "cuda")
    whole = frames_of(program, path, shape_of(model), 5, *options)
    kept = tmp_path / "kept"
    first = frames_of(program, path, shape_of(model), 2, *options, "--save", kept)
    rest = frames_of(program, path, shape_of(model), 3, *options, "--resume", kept)
    assert torch.equal(torch.cat([first, rest], dim=1), whole)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "engine.safetensors", "kept"}

    refused(run(program, path, "--resume", kept, "--guidance", 2.5 - guidance), "resume: ", "kept", "another batch")
    kept.write_bytes(kept.read_bytes()[:-1])
    refused(run(program, path, "--resume", kept, "--guidance", guidance), "resume: ", "truncated or damaged")


def test_noise_is_normal_and_of_its_seed_and_frame(program, tmp_path):
    model = small(mixer="product", positions="space", size=(64, 64)).float()
    with torch.no_grad():  # nothing is changed of the noise
        model.patch_out.weight.zero_(), model.patch_out.bias.zero_()
    path = tmp_path / "engine.safetensors"
    export_model(write(tmp_path / "model.safetensors", model), path)
    frames = frames_of(program, path, shape_of(model), 2).flatten(2)  # (C, frames, H * W)
    assert abs(frames.mean()) < 0.02 and abs(frames.var() - 1) < 0.03
    assert abs((frames**4).mean() - 3) < 0.2 and (frames.abs() > 1.96).float().mean().sub(0.05).abs() < 0.005
    assert torch.corrcoef(frames.flatten(0, 1)).fill_diagonal_(0).abs().max() < 0.07
    assert not torch.equal(frames, frames_of(program, path, shape_of(model), 2, "--seed", 1).flatten(2))


def test_nothing_is_allocated_after_the_first_frame(program, tmp_path):
    _, path = exported(tmp_path, mixer=["product", "power"], n_classes=4)
    (tmp_path / "count.c").write_text(COUNTS_ALLOCATIONS)
    call(CXX, "-x", "c", "-shared", "-fPIC", tmp_path / "count.c", "-o", tmp_path / "count.so")
    said = []
    for frames in (4, 40):
        environment = {**ENVIRONMENT, "LD_PRELOAD": str(tmp_path / "count.so")}
        options = ["--frames", frames, "--label", "0,3" + ",0,3" * 19, "--guidance", 2, "--context-noise", 0.1]
        said.append(run(program, path, *options, env=environment).stderr.decode().splitlines()[-1])
    assert said[0].startswith("allocations: ") and said[0] == said[1]


def test_it_ends_when_nobody_looks(program, tmp_path):
    _, path = exported(tmp_path, mixer="product")
    kept = tmp_path / "kept"
    words = [program, path, "--save", kept]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as endless:
        assert endless.stdout.read(2) == b"P6"
        endless.stdout.close()
        assert endless.wait(timeout=60) == 0
        assert b" ms each (median)\n" in endless.stderr.read()
    assert run(program, path, "--resume", kept, "--frames", 1).returncode == 0
    with open("/dev/full", "wb") as full:
        done = subprocess.run([program, path], stdout=full, stderr=subprocess.PIPE, check=False, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stderr.endswith(b"error: standard output cannot be written\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "expected a MODEL"),
        (["{model}", "{model}"], "expected one MODEL"),
        (["{model}", "--frames", "0"], "--frames: expected an integer of at least 1, got '0'"),
        (["{model}", "--frames"], "--frames: expected a value"),
        (["{model}", "--frame", "2"], "--frame: no such option"),
        (["{model}", "--guidance", "nan"], "--guidance: expected a number"),
        (["{model}", "--guidance", "2"], "without classes"),
        (["{model}", "--label", "0"], "no classes"),
        (["{model}", "--label", "1,x"], "--label: expected an integer"),
        (["{model}", "--context-noise", "1"], "--context-noise: expected"),
        (["{model}", "--format", "gif"], "--format: expected ppm"),
        (["{model}", "--resume", "{model}.no"], "is no file"),
        (["{model}", "--noise", "{model}.no"], "cannot be opened"),
        (["{model}.no"], "is no file"),
    ],
)
def test_mistakes_are_one_line(options, text, program, tmp_path):
    _, path = exported(tmp_path, mixer="product")
    refused(run(program, *(word.format(model=path) for word in options)), text)


def test_mistakes_that_depend_on_the_model(program, tmp_path):
    model, path = exported(tmp_path, mixer="product", n_classes=4, in_channels=2, context="shared")
    refused(run(program, path), "2 channels", "--format f32")
    refused(run(program, path, "--format", "f32", "--label", "5"), "label: expected 0 to 4")
    refused(run(program, path, "--format", "f32", "--context-noise", "0.5"), "noise of the frames before")
    (tmp_path / "noise").write_bytes(bytes(4 * torch.Size(shape_of(model)).numel() - 1))
    done = run(program, path, "--format", "f32", "--noise", tmp_path / "noise")
    assert done.returncode == 1 and b"ends before the video does" in done.stderr


def reheaded(path, change):
    """The bytes of a safetensors file whose header was changed as a dictionary or as text."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    changed = change(header)
    changed = (json.dumps(header) if changed is None else changed).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + size :]


HEADERS = {
    "missing tensor": (lambda h: h.pop("positions") and None, "lacks the tensor 'positions'"),
    "other shape": (
        lambda h: h["patch_in.bias"].update(shape=[4, 4]),
        "has 'patch_in.bias' as F32 (4, 4), expected F32",
    ),
    "other dtype": (lambda h: h["patch_in.bias"].update(dtype="I32"), "as I32"),
    "shape and place": (lambda h: h["patch_in.bias"].update(shape=[17]), "another shape than place"),
    "outside": (lambda h: h["patch_in.bias"].update(data_offsets=[10**9, 10**9 + 64]), "lies outside"),
    "backwards": (lambda h: h["patch_in.bias"].update(data_offsets=[64, 0]), "lies outside"),
    "overflow": (lambda h: h["positions"].update(shape=[2**32, 2**32]), "another shape than place"),
    "negative": (lambda h: h["positions"].update(shape=[-6, -16]), "no integer"),
    "huge": (lambda h: h["positions"].update(shape=[10**30]), "no ']'"),
    "strange entry": (lambda h: h["positions"].update(more=[1]), "unknown entry 'more'"),
    "no metadata": (lambda h: h.pop("__metadata__") and None, "pom-ext export"),
    "later version": (lambda h: h["__metadata__"].update(format="pom_ext video 3"), "another version"),
    "no number": (lambda h: h["__metadata__"].update(dim="16x"), "'16x' for 'dim'"),
    "no size": (lambda h: h["__metadata__"].update(size="4 5"), "patch does not divide"),
    "too few layers": (lambda h: h["__metadata__"].update(heads="1"), "2 numbers for 'heads'"),
    "other form": (lambda h: h["__metadata__"].update(forms="product cubic"), "unknown form cubic"),
    "degree": (lambda h: h["__metadata__"].update(degrees="0 2"), "'0' for 'degrees'"),
    "heads": (lambda h: h["__metadata__"].update(heads="7 1"), "mixer_in"),
    "not JSON": (lambda h: "hello", "no '{'"),
    "no end": (lambda h: json.dumps(h)[:-1], "no '}'"),
    "two objects": (lambda h: json.dumps(h) + "{}", "more in its header"),
    "cut string": (lambda h: '{"posi', "ends too early"),
    "cut escape": (lambda h: '{"posi\\', "an escape"),
    "twice": (lambda h: json.dumps(h)[:-1] + ', "positions": ' + json.dumps(h["positions"]) + "}", "twice"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_wrong(name, program, tmp_path):
    change, text = HEADERS[name]
    _, path = exported(tmp_path, mixer="product")
    path.write_bytes(reheaded(path, change))
    refused(run(program, path, "--frames", 1), str(path), text)


def test_files_that_are_cut_or_something_else(program, tmp_path):
    _, path = exported(tmp_path, mixer="product")
    assert run(program, path, "--frames", 1).returncode == 0
    content = path.read_bytes()
    for size in (0, 7, 8, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(run(program, path), str(path), "safetensors" if size <= 500 else "truncated")
    path.write_text("I am no model.")
    refused(run(program, path), "not a safetensors file")
    refused(run(program, tmp_path / "model.safetensors"), "pom-ext export")
    refused(run(program, tmp_path), "is no file")


REFUSED = {
    "attention": ({"mixer": ["product", "attention"]}, "mixer: expected product or power"),
    "text": ({"text_dim": TEXT_DIM}, f"text_dim={TEXT_DIM}"),
    "positions": ({"positions": "sincos"}, "positions: expected 'space'"),
    "two times": ({"two_times": True}, "two_times: expected False"),
    "rotary": ({"positions": "rotary", "n_heads": 8, "mixer": "power"}, "got 'rotary'"),
    "hybrid": ({"mixer": "attention+product"}, "mixer: expected product or power"),
    "split": ({"read": "split"}, "read: expected 'shared', got 'split'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_it_cannot_run_are_not_exported(name, tmp_path):
    changes, text = REFUSED[name]
    checkpoint = write(tmp_path / "model.safetensors", small(**{"mixer": "product", "positions": "space", **changes}))
    assert_fails(command("export", checkpoint, "--out", tmp_path / "engine.safetensors"), text)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_frequencies_of_time_are_those_of_the_model(tmp_path):
    for changes, fastest in (({}, 1.0), ({"time_frequency": 0.25}, 0.25)):
        model = small(mixer="product", positions="space", **changes)
        export_model(write(tmp_path / "model.safetensors", model), tmp_path / "engine.safetensors")
        assert load_file(tmp_path / "engine.safetensors")["time.frequencies"].max() == fastest


def test_checkpoints_of_another_kind_are_not_exported(tmp_path):
    out = tmp_path / "out" / "engine.safetensors"
    noise = write(tmp_path / "noise", small(mixer="product", positions="space"), objective="noise")
    assert_fails(command("export", noise, "--out", out), "objective: expected flow matching", "'noise'")
    images = write(tmp_path / "images", ImageDiT(3, 8, patch=4, dim=16, n_layers=1, n_heads=2))
    assert_fails(command("export", images, "--out", out), "images", "is one of images")
    assert_fails(command("export", tmp_path / "none", "--out", out), "no file at")
    (tmp_path / "text").write_text("no checkpoint")
    assert_fails(command("export", tmp_path / "text", "--out", out), "not a safetensors file")
    assert not out.exists() and not out.parent.exists()


def test_the_command_writes_the_file(program, tmp_path):
    _, path = exported(tmp_path, mixer="product")
    out = tmp_path / "other" / "engine.safetensors"
    result = command("export", tmp_path / "model.safetensors", "--out", out)
    assert result.exit_code == 0 and str(out) in result.stderr
    model = small(mixer="product", positions="space")
    assert torch.equal(*(frames_of(program, file, shape_of(model), 2) for file in (out, path)))
    assert run(program, "--help").stdout.startswith(b"usage: stream MODEL")
