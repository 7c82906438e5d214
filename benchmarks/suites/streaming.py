"""Time and memory of one more frame of a stream after so many others, with PoM and with attention.

At each length the models take turns at drawing the next frame from the same past. The streams are then put back
(`VideoStream.restore`), so that every round draws the same frame.
"""

import statistics
import time

import torch

from pom_ext.layers.attention import FrameAttention
from pom_ext.models import VideoDiT
from pom_ext.streaming import VideoStream

from ..harness import report
from ..harness.command import parse, suite_parser
from ..harness.report import amount

# (config, longest stream in frames). "digits" and "game" are the models of the demo and of README's game, "S/2" the
# standard size on latents of 256 x 256 pixels.
MODELS = {
    "digits": ({"in_channels": 1, "size": (32, 32), "patch": (1, 4, 4), "dim": 96, "n_layers": 4, "n_heads": 8}, 1024),
    "game": ({"in_channels": 3, "size": (64, 64), "patch": (1, 8, 8), "dim": 192, "n_layers": 6, "n_heads": 8}, 1024),
    "S/2": ({"in_channels": 4, "size": (32, 32), "patch": (1, 2, 2), "dim": 384, "n_layers": 12, "n_heads": 6}, 128),
}
ATTENTION = "attention"
NEAR, FAR, BOUND = 10, 1000, 0.05  # frame FAR takes as long as frame NEAR, within this share
LENGTHS = (0, 1, 2, 4, 8, 10, 16, 32, 64, 128, 256, 512, 1000)
MIXERS = ("power", "product", ATTENTION)


class CachedAttention(FrameAttention):
    """Attention at its best: its cache has spare room and is extended in place, not copied.

    Only for this benchmark: two forks of one stream would overwrite each other's frames.
    """

    def extend(self, cache, keys, values):
        if cache is None:
            return keys, values
        return tuple(self.behind(held, new) for held, new in zip(cache, (keys, values)))

    @staticmethod
    def behind(held, new):
        length = held.shape[1] + new.shape[1]
        room = held if held._base is None else held._base
        if room.shape[1] < length:
            room = held.new_empty(held.shape[0], 2 * length, held.shape[2])
            room[:, : held.shape[1]] = held
        room[:, held.shape[1] : length] = new
        return room[:, :length]


def make_stream(config, mixer, steps):
    """A stream of a model with random weights; noise on them opens the gates of the residual branches."""
    torch.manual_seed(0)
    model = VideoDiT(**config, length=16, n_classes=4, mixer=mixer, positions="space").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for block in model.blocks:
        if mixer == ATTENTION:
            block.mixer.__class__ = CachedAttention
    return VideoStream(model, [0], steps=steps)


def watch(stream, frames, chunk=16):
    """Show the stream frames of noise until it holds so many frames."""
    model = stream.model
    while stream.frame < frames:
        missing = min(chunk, frames - stream.frame)
        stream.prefill(torch.randn(1, model.in_channels, missing * model.patch[0], *stream.size))


def milliseconds(stream):
    kept = stream.fork()
    begin = time.perf_counter()
    stream.next()
    passed = 1e3 * (time.perf_counter() - begin)
    stream.restore(kept)
    return passed


def measure(name, steps, rounds):
    """The JSON of one model: milliseconds and bytes of every mixer at every length, and the comparisons."""
    config, most = MODELS[name]
    streams = {mixer: make_stream(config, mixer, steps) for mixer in MIXERS}
    rows, near = [], {}
    for length in (length for length in LENGTHS if length <= most):
        for mixer, stream in streams.items():
            watch(stream, length)
            if length == NEAR:
                near[mixer] = stream.fork()
        times = {mixer: [] for mixer in MIXERS}
        for turn in range(rounds + 2):
            for mixer, stream in streams.items():
                passed = milliseconds(stream)
                if turn >= 2:
                    times[mixer].append(passed)
        medians = {mixer: statistics.median(values) for mixer, values in times.items()}
        rows.append({"frame": length, "ms": medians, "bytes": {mixer: s.nbytes for mixer, s in streams.items()}})
        shown = "  ".join(f"{mixer} {medians[mixer]:8.2f} ms {amount(s.nbytes):>10}" for mixer, s in streams.items())
        print(f"  after {length:5} frames   {shown}", flush=True)
    result = {"model": name, "config": config, "steps": steps, "rounds": rounds, "lengths": rows, "break_even": {}}
    for mixer in MIXERS[:-1]:
        result["break_even"][mixer] = break_even(rows, mixer)
        print(f"  {mixer} is faster than attention {said(result['break_even'][mixer])}", flush=True)
    if FAR <= most:
        result["far_over_near"] = {mixer: far_over_near(streams[mixer], near[mixer], 4 * rounds) for mixer in MIXERS}
        for mixer, ratio in result["far_over_near"].items():
            verdict = "" if mixer == ATTENTION else "reached" if abs(ratio - 1) <= BOUND else "MISSED"
            print(f"  {mixer}: frame {FAR} takes {ratio:.3f} of frame {NEAR}   {verdict}", flush=True)
    return result


def break_even(rows, mixer):
    """The length from which on the mixer was faster than attention at every length measured, or None."""
    slower = [i for i, row in enumerate(rows) if row["ms"][mixer] >= row["ms"][ATTENTION]]
    first = slower[-1] + 1 if slower else 0
    return rows[first]["frame"] if first < len(rows) else None


def said(length):
    return "at no length measured" if length is None else f"from {length} frames on"


def far_over_near(far, near, rounds):
    """Median over rounds of the time of frame FAR over that of frame NEAR, drawn side by side."""
    ratios = []
    for turn in range(rounds):
        pair = (far, near) if turn % 2 else (near, far)
        passed = {id(stream): milliseconds(stream) for stream in pair}
        ratios.append(passed[id(far)] / passed[id(near)])
    return statistics.median(ratios)


def main(arguments=None):
    parser = suite_parser("streaming")
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--steps", type=int, default=4, help="solver steps of a frame")
    parser.add_argument("--rounds", type=int, default=15)
    options = parse(parser, arguments)
    content = report.begin(models=[])
    for name in options.model:
        print(f"\n{name}: {options.steps} solver steps a frame", flush=True)
        content["models"].append(measure(name, options.steps, options.rounds))
        report.save(content, options.json)
    return 0
