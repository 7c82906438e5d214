"""One frame step of a `VideoDiT` as an AOTInductor package, for programs that have libtorch but no Python.

The package is one function of tensors of constant shapes, with the compiled operations in it:

    frame, time, labels (where the model has classes), state... -> prediction, state after the frame...

frame and prediction: (B, C, patch[0], H, W); time: (B,) in [0, 1000], in the dtype of the model; labels: (B,) int64.
state: what a `Past` holds, in the order of its `state_dict`: "{layer}.total", "{layer}.residual" and "{layer}.count" of
    every layer, then "{layer}.tail" of every layer with a local convolution. With positions other than "space" "frames",
    the number of frames so far, int64 (), comes before them. The state before the first frame is zeros.

With clean context, every evaluation of a solver is a call with the same state, whose new state is dropped; one more with
the finished frame at time 0 gives the state for the next frame. With shared noise every evaluation carries a state of
its own. The metadata say which (`context`), what the prediction is (`objective`, "flow" or "noise", and `shift`), the
number of classes (`n_classes`), and in `inputs`, a line for each: name, dtype, sizes.

`examples/aoti` is such a program. It must load the library of operations before the package, and asks it by
AOTI_RUNTIME_CHECK_INPUTS=1 in the environment to check the shapes that it is given.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .._io import atomic_write
from ..diffusion import FlowMatching
from ..diffusion.objectives import OBJECTIVES, check_context
from ..models.video import VideoDiT
from ..ops import State
from ..ops.state import FIELDS


class FrameStep(nn.Module):
    """The model as the function of tensors that is described above; `start` is the `Past` before the first frame."""

    def __init__(self, model, start):
        super().__init__()
        self.model, self.start = model, start
        self.numbered = model.positions != "space"

    def inputs(self):
        """{name: tensor} of the call that begins a stream, all zeros. None share memory: torch would trace them as one."""
        weight, past = self.model.like, self.start.clone()
        batch, size = past.memories[0].count.shape[0], (past.height, past.width)
        t, *patch = self.model.patch
        pixels = [count * side for count, side in zip(size, patch)]
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
        layers = len(FIELDS) * len(self.start.memories)
        memories = (State(*rest[first : first + len(FIELDS)]) for first in range(0, layers, len(FIELDS)))
        past = replace(self.start, frames=self._frames(number), memories=tuple(memories), tails=tuple(rest[layers:]))
        out, past = self.model(frame, time, labels=labels, frame_causal=True, past=past, return_past=True)
        # Standard strides, in which it goes in again: a slice of one video keeps those of the whole.
        state = (t.clone(memory_format=torch.contiguous_format) for t in _tensors(past).values())
        return out, *([number + 1] if self.numbered else []), *state

    def _frames(self, number):
        """The number of frames so far, as an integer that is not known before the package runs."""
        if number is None:
            return 0
        frames = number.item()
        if self.model.positions == "sincos":  # the package checks it too: these positions end
            torch._check(frames >= 0)
            torch._check(frames < self.model.length // self.model.patch[0])
        return frames


def _tensors(past):
    return {name: t for name, t in past.state_dict().items() if name not in ("seen", "forgetting")}


def trace_frame_step(model, *, batch=1, size=None, window=0, decay=1.0):
    """The frame step as a `torch.export.ExportedProgram`, and {name: tensor} of the inputs that it begins with.

    Args:
        model: a `VideoDiT` without text and without attention, whose memory would grow.
        batch, size, window, decay: as in `VideoDiT.start`.

    Raises:
        TypeError, ValueError: an argument outside what is said above. ImportError: nothing compiled.
    """
    if not isinstance(model, VideoDiT):
        raise TypeError(f"model: expected a VideoDiT, got {type(model).__name__}")
    if "attention" in model.config["mixer"]:
        raise ValueError(
            "model: expected polynomial mixers in all layers, got attention: its memory grows with every frame, and the "
            "shapes of a frame step are constant"
        )
    if model.text_dim:
        raise ValueError(
            f"model: expected one without text, got text_dim={model.text_dim}; a frame step has labels only"
        )
    step = FrameStep(model, model.start(batch, size, window=window, decay=decay))
    inputs = step.inputs()
    with torch.no_grad():
        return torch.export.export(step, tuple(inputs.values())), inputs


def export_frame_step(model, path, *, batch=1, size=None, window=0, decay=1.0, objective=None, context="clean"):
    """Compile the frame step and write it to a .pt2 file, whole or not at all. It is for the device and the dtype of the
    model, this version of torch and processors like this one. Needs a C++ compiler.

    Args:
        model, batch, size, window, decay: as in `trace_frame_step`.
        objective, context: what the model was trained for, as in `VideoStream`: for the program to know.

    Raises:
        what `trace_frame_step` raises; ValueError for a path that does not end in .pt2, or another context. RuntimeError:
            no compiler, or it failed.
    """
    import torch._inductor

    path, objective = Path(path), FlowMatching() if objective is None else objective
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, by which torch knows a package, got {path}")
    check_context(context)
    program, inputs = trace_frame_step(model, batch=batch, size=size, window=window, decay=decay)
    lines = (" ".join([name, str(t.dtype).removeprefix("torch."), *map(str, t.shape)]) for name, t in inputs.items())
    names = {kind: name for name, kind in OBJECTIVES.items()}
    metadata = {
        "inputs": "\n".join(lines), "n_classes": str(model.n_classes), "objective": names[type(objective)],
        "shift": str(objective.shift), "context": context,
    }  # fmt: skip
    with (
        atomic_write(path) as aside,
        open(aside, "wb") as file,
    ):  # a file, since torch refuses names that end otherwise
        torch._inductor.aoti_compile_and_package(
            program, package_path=file, inductor_configs={"aot_inductor.metadata": metadata}
        )
