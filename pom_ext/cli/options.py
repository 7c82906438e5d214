"""Options that several commands share, and groups of options as dataclasses."""

import functools
import inspect
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint (model.safetensors) of an image model.")]
VideoCheckpoint = Annotated[Path, typer.Argument(help="Checkpoint (model.safetensors) of a video model.")]
Labels = Annotated[
    str | None, typer.Option(help="Classes, by name or number: 3,7. Default: the first ten; for a game the first.")
]
Steps = Annotated[int | None, typer.Option(help="Solver steps per frame. Default: 8 (play: 4); for meanflow 1.")]
Solver = Annotated[str, typer.Option(help="euler or heun.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda if the library has CUDA kernels. Default: the faster.")]


def flatten_groups(command):
    """Let a command take dataclasses: typer sees one option for each field, the command gets the dataclass.

    A field is written like a parameter of a command: name: Annotated[type, typer.Option(...)] = default.
    """
    groups, flat = {}, []
    for parameter in inspect.signature(command).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            flat += inspect.signature(parameter.annotation).parameters.values()
        else:
            flat.append(parameter)

    @functools.wraps(command)
    def run(**values):
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    run.__signature__ = inspect.Signature([parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in flat])
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


@dataclass
class FrameOptions:
    """How `stream` and `play` draw frames."""

    usual_steps: ClassVar[int] = 8  # of an objective that needs several

    size: Annotated[str | None, typer.Option(help="Height x width, 48x64. Default: the size in training.")] = None
    steps: Steps = None
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1: none.")] = 1.0
    seed: Seed = 0
    context_noise: Annotated[float, typer.Option(help="Noise in cached frames, 0 to 1; reduces drift.")] = 0.0
    window: Annotated[int, typer.Option(help="Number of latest frames to remember; 0: all.")] = 0
    decay: Annotated[float, typer.Option(help="Factor on the weight of a frame with each later one; 1: no decay.")] = (
        1.0
    )
    resume: Annotated[Path | None, typer.Option(help="Continue this saved stream, with its settings.")] = None
    device: Device = None

    def open(self, network, settings, labels=None):
        """The `VideoStream` of a network and its checkpoint's settings; with --resume the saved stream."""
        from ..diffusion.context import stream_context
        from ..streaming import VideoStream
        from .common import parse_size, trained_objective

        if self.resume is not None:
            return VideoStream.load(self.resume, network)
        context, objective = stream_context(settings["train"]["context"]), trained_objective(settings)
        steps = min(self.usual_steps, objective.default_steps) if self.steps is None else self.steps
        options = {**vars(self), "size": parse_size(self.size), "steps": steps}
        del options["resume"], options["device"]
        return VideoStream(network, labels, context=context, objective=objective, **options)
