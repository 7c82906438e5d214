"""The command that writes a video model for programs in C++."""

from pathlib import Path
from typing import Annotated

import typer

from .video import load_video_model, objective_of


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a video model.")],
    out: Annotated[
        Path, typer.Option(help="The safetensors file to write, for the engine without torch: examples/stream.cpp.")
    ] = Path("engine.safetensors"),
    aoti: Annotated[
        Path | None,
        typer.Option(help="Write a compiled step of a frame for libtorch instead, into this .pt2 file."),
    ] = None,
    device: Annotated[str, typer.Option(help="Of the compiled step: cpu or cuda.")] = "cpu",
):
    """Write a video model for programs in C++: its weights for the engine, or a compiled package for libtorch."""
    if aoti is None:
        from ..export import export_model

        export_model(checkpoint, out)
    else:
        from ..export import export_frame_step

        model, settings = load_video_model(checkpoint, device)
        export_frame_step(model, aoti, objective=objective_of(settings), context=settings["train"]["context"])
    typer.echo(f"wrote {out if aoti is None else aoti}", err=True)
