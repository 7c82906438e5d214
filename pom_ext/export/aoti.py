"""One frame step of a `VideoDiT` as an AOTInductor package, for programs that have libtorch but no Python.

The package is one function of tensors with constant shapes; it contains the compiled operations:

    frame, time, labels (if the model has classes), state... -> prediction, state after the frame...

frame and prediction: (B, C, patch[0], H, W); time: (B,) in [0, 1000], in the dtype of the model; labels: (B,) int64.
state: the tensors of a `StreamCache`, in the order of its `state_dict`: "{layer}.total", "{layer}.residual" and
    "{layer}.count" of every layer, then "{layer}.tail" of every layer that sees earlier frames. With positions other
    than "space", "frames", the number of frames so far, int64 (), precedes them. The state before the first frame is
    all zeros.

With clean context, every evaluation of a solver calls the function with the same state and drops the new state. One
more call, with the finished frame at time 0, returns the state for the next frame. With shared noise, every evaluation
has its own state. The package's metadata contain: `context`; what the prediction is (`objective`, "flow" or "noise",
and `shift`); the number of classes (`n_classes`); and `inputs`, one line per input: name, dtype, sizes.

`examples/aoti` is a program that uses the package. A program must load the library of operations before the package.
AOTI_RUNTIME_CHECK_INPUTS=1 in its environment makes the package check the shapes of its inputs.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .._io import atomic_write
from ..diffusion import FlowMatching
from ..diffusion.context import check_context
from ..models.config import VideoDiTConfig
from ..models.video import VideoDiT
from ..ops import State
from ..ops.state import FIELDS


class FrameStep(nn.Module):
    """The model as the function of tensors described above; `start` is the `StreamCache` before the first frame."""

    def __init__(self, model, start):
        super().__init__()
        self.model, self.start = model, start
        self.numbered = model.positions != "space"

    def inputs(self):
        """{name: tensor} of a stream's first call, all zeros. No two share memory: torch would trace them as one."""
        weight, past = self.model.reference_parameter, self.start.clone()
        batch, size = past.mixer_caches[0].count.shape[0], (past.height, past.width)
        t, *patch = self.model.patch
        pixels = [count * side for count, side in zip(size, patch, strict=True)]
        inputs = {"frame": weight.new_zeros(batch, self.model.in_channels, t, *pixels), "time": weight.new_zeros(batch)}
        if self.model.n_classes:
            inputs["labels"] = weight.new_zeros(batch, dtype=torch.int64)
        if self.numbered:
            inputs["frames"] = weight.new_zeros((), dtype=torch.int64)
        return inputs | _tensors(past)

    def forward(self, frame, time, *rest):
        rest = list(rest)
        labels = rest.pop(0) if self.model.n_classes else None
        number = rest.pop(0) if self.numbered else None
        layers = len(FIELDS) * len(self.start.mixer_caches)
        mixer_caches = (State(*rest[first : first + len(FIELDS)]) for first in range(0, layers, len(FIELDS)))
        tails = iter(rest[layers:])
        conv_caches = tuple(None if cache is None else next(tails) for cache in self.start.conv_caches)
        caches = {"mixer_caches": tuple(mixer_caches), "conv_caches": conv_caches}
        past = replace(self.start, frames=self._frames(number), **caches)
        out, past = self.model(frame, time, labels=labels, frame_causal=True, past=past, return_past=True)
        # Standard strides, as the next call expects: a slice of a batch has the strides of the whole batch.
        state = (t.clone(memory_format=torch.contiguous_format) for t in _tensors(past).values())
        return out, *([number + 1] if self.numbered else []), *state

    def _frames(self, number):
        """The number of frames so far, as an integer that is unknown until the package runs."""
        if number is None:
            return 0
        frames = number.item()
        if self.model.positions == "sincos":  # a finite table of positions; the package checks this too
            torch._check(frames >= 0)
            torch._check(frames < self.model.length // self.model.patch[0])
        return frames


def _tensors(past):
    return {name: t for name, t in past.state_dict().items() if name not in ("seen", "forgetting")}


def trace_frame_step(model, *, batch=1, size=None, window=0, decay=1.0):
    """The frame step as a `torch.export.ExportedProgram`, and {name: tensor} of the inputs of its first call.

    Args:
        model: a `VideoDiT` with one time, without text and without attention, whose cache would grow.
        batch: argument of `VideoDiT.start`.
        size: argument of `VideoDiT.start`.
        window: argument of `VideoDiT.start`.
        decay: argument of `VideoDiT.start`.

    Raises:
        TypeError, ValueError: an argument that does not fit this description.
        ImportError: the library is not compiled.
    """
    if not isinstance(model, VideoDiT):
        raise TypeError(f"model: expected a VideoDiT, got {type(model).__name__}")
    if "attention" in VideoDiTConfig(**model.config).mixers:
        raise ValueError(
            "model: expected polynomial mixers in all layers, got attention: its memory grows with every frame, and "
            "the shapes of a frame step are constant"
        )
    if model.text_dim:
        raise ValueError(
            f"model: expected one without text, got text_dim={model.text_dim}; a frame step has labels only"
        )
    if model.config["two_times"]:
        raise ValueError("model: expected two_times=False, got True; a frame step has one time")
    step = FrameStep(model, model.start(batch, size, window=window, decay=decay))
    inputs = step.inputs()
    with torch.no_grad():
        return torch.export.export(step, tuple(inputs.values())), inputs


def export_frame_step(model, path, *, batch=1, size=None, window=0, decay=1.0, objective=None, context="clean"):
    """Compile the frame step and write it to a .pt2 file, completely or not at all. Needs a C++ compiler.

    The package is for the device and dtype of the model, for this version of torch and for processors like this one.

    Args:
        model: as in `trace_frame_step`.
        path: file to write.
        batch: as in `trace_frame_step`.
        size: as in `trace_frame_step`.
        window: as in `trace_frame_step`.
        decay: as in `trace_frame_step`.
        objective: the model's objective in training, for the metadata; None: `FlowMatching()`.
        context: the model's context in training, "clean" or "shared", for the metadata.

    Raises:
        TypeError, ValueError, ImportError: as in `trace_frame_step`; ValueError also for a path that does not end in
            .pt2, for an unknown context and for an objective that is not the model's.
        RuntimeError: there is no compiler, or it failed.
    """
    import torch._inductor

    path, objective = Path(path), FlowMatching() if objective is None else objective
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, by which torch knows a package, got {path}")
    check_context(context, objective=objective)
    program, inputs = trace_frame_step(model, batch=batch, size=size, window=window, decay=decay)
    for reason in objective.supports(model, video=True):
        raise ValueError(reason)
    lines = (" ".join([name, str(t.dtype).removeprefix("torch."), *map(str, t.shape)]) for name, t in inputs.items())
    trained = {name: str(value) for name, value in objective.describe().items()} | {"context": context}
    metadata = {"inputs": "\n".join(lines), "n_classes": str(model.n_classes), **trained}
    with atomic_write(path) as aside, open(aside, "wb") as file:  # open, since torch refuses a path without .pt2
        torch._inductor.aoti_compile_and_package(
            program, package_path=file, inductor_configs={"aot_inductor.metadata": metadata}
        )
