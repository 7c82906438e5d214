"""Latency of one more frame of a layer: the engine in C++, the engine from Python, and the operation of torch.

Builds the torch-free library with CMake. All contenders run on one thread and take turns in blocks of frames. A frame
is one `commit`: the polynomial features of its tokens are added to the running state, which all its tokens read.
Projections are left out: they are matrix products, the same for all contenders.
"""

import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from ..harness import report
from ..harness.command import parse, suite_parser

ROOT = Path(__file__).parents[2]
TOKENS, DEGREE, EXPAND = 256, 3, 2
SHAPES = {"S": (384, 6), "B": (768, 12), "XL": (1152, 16)}  # width of the tokens, heads
ROUNDS, WARM_UP = 10, 200
BOUND = 2.0  # microseconds that a call of the engine may add to the kernel it calls


def build(folder):
    """Build the library without CUDA and the C++ program. Returns the path of the program."""
    options = ("-DPOM_CUDA=OFF", "-DPOM_BENCHMARK=ON", "-DCMAKE_BUILD_TYPE=Release")
    for command in (("-S", ROOT, "-B", folder, *options), ("--build", folder, "--target", "engine_benchmark", "-j")):
        subprocess.run(("cmake", *command), check=True, stdout=subprocess.DEVNULL)
    return Path(folder) / "engine_benchmark"


def in_cpp(program, width, heads, frames, what="commit"):
    """Microseconds of every frame."""
    tokens = 1 if what == "overhead" else TOKENS  # the engine itself never looks at tokens: one leaves the least noise
    words = (program, *map(str, (tokens, width, DEGREE, heads, frames)), what)
    return np.frombuffer(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)


def timed(call, frames):
    """Microseconds of every frame."""
    times = np.empty(frames)
    for i in range(-WARM_UP, frames):
        begin = time.perf_counter_ns()
        call()
        if i >= 0:
            times[i] = (time.perf_counter_ns() - begin) / 1e3
    return times


def in_python(width, heads):
    """{contender: a call that takes one frame} of the contenders in this process."""
    import torch

    from pom_ext import State, polynomial_update
    from pom_ext.engine import Layer, Stream

    torch.set_num_threads(1)
    u, gate = torch.randn(1, TOKENS, width), torch.randn(1, TOKENS, heads)
    coeff, out = torch.full((width, DEGREE), 0.1), torch.empty(1, TOKENS, width)
    stream, state = Stream([Layer(width, "power", DEGREE, heads)]), State.empty(1, width)

    @torch.no_grad()
    def operation():
        polynomial_update(u, gate, state, coeff, form="power", degree=DEGREE, n_sel_heads=heads)

    return {"engine from Python": lambda: stream.commit(0, u, gate, coeff, out=out), "torch": operation}


def figures(times):
    """Statistics of the times of all frames, in microseconds."""
    median, p99, worst = np.quantile(times, [0.5, 0.99, 1])
    spread = np.quantile(times, 0.75) - np.quantile(times, 0.25)
    return {"median_us": median, "p99_us": p99, "worst_us": worst, "iqr_us": spread, "frames": len(times)}


def measure(name, program, frames):
    """The JSON of one shape."""
    dim, heads = SHAPES[name]
    width, calls = EXPAND * dim, in_python(EXPAND * dim, heads)
    times = {contender: [] for contender in ("engine", *calls)}
    for _ in range(ROUNDS):
        times["engine"].append(in_cpp(program, width, heads, frames // ROUNDS))
        for contender, call in calls.items():
            times[contender].append(timed(call, frames // ROUNDS))
    extra = np.median(in_cpp(program, width, heads, frames, "overhead"))
    result = {"shape": name, "tokens": TOKENS, "width": width, "degree": DEGREE, "heads": heads, "overhead_us": extra}
    result["contenders"] = {contender: figures(np.concatenate(parts)) for contender, parts in times.items()}
    print(f"\n{name}: {TOKENS} tokens x {width}, {heads} heads, float32, one thread, {frames:,} frames")
    for contender, row in result["contenders"].items():
        told = "  ".join(f"{word} {row[f'{word}_us']:8.1f} µs" for word in ("median", "p99", "worst", "iqr"))
        print(f"  {contender:18}  {told}")
    verdict = "reached" if extra < BOUND else "MISSED"
    print(f"  the engine's own part of a call: {extra:.3f} µs, bound {BOUND} µs   {verdict}", flush=True)
    return result


def main(arguments=None):
    parser = suite_parser("engine")
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--frames", type=int, default=10_000)
    options = parse(parser, arguments)
    if options.frames < ROUNDS:
        parser.error(f"--frames: expected at least {ROUNDS}, got {options.frames}")
    content = report.begin(shapes=[])
    with tempfile.TemporaryDirectory() as folder:
        program = build(folder)
        for name in options.shape:
            content["shapes"].append(measure(name, program, options.frames))
            report.save(content, options.json)
    return 0
