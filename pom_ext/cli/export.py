"""The command export."""

from pathlib import Path
from typing import Annotated

import typer

from .common import load_video_model, trained_objective
from .options import VideoCheckpoint


def export(
    checkpoint: VideoCheckpoint,
    out: Annotated[
        Path, typer.Option(help="Safetensors file to write, for the C++ engine without torch (examples/stream.cpp).")
    ] = Path("engine.safetensors"),
    aoti: Annotated[
        Path | None,
        typer.Option(help="Instead of --out, compile one frame step for libtorch into this .pt2 file."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the compiled frame step: cpu or cuda.")] = "cpu",
):
    """Write a video model for programs in C++: its weights for the engine, or a compiled package for libtorch."""
    if aoti is None:
        from ..export import export_model

        export_model(checkpoint, out)
    else:
        from ..export import export_frame_step

        model, settings = load_video_model(checkpoint, device)
        export_frame_step(model, aoti, objective=trained_objective(settings), context=settings["train"]["context"])
    typer.echo(f"wrote {out if aoti is None else aoti}", err=True)
