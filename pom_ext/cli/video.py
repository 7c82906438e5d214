"""The commands of video models: stream, play and export."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from .common import class_numbers, load_video_model, trained_objective
from .options import FrameOptions, Labels, Solver, VideoCheckpoint


@dataclass
class StreamOptions(FrameOptions):
    """How `stream` draws frames."""

    solver: Solver = "euler"


@dataclass
class PlayOptions(FrameOptions):
    """How `play` draws frames."""

    usual_steps: ClassVar[int] = 4


def stream(
    checkpoint: VideoCheckpoint,
    *,
    out: Annotated[
        str, typer.Option(help="A .mp4, .gif or .png (contact sheet) file; window; or - for raw rgb24 on stdout.")
    ] = "clip.mp4",
    frames: Annotated[int | None, typer.Option(help="Frames to draw. Default: 64; endless for a window and -.")] = None,
    labels: Labels = None,
    actions: Annotated[
        str | None, typer.Option(help="Actions of a game, one per frame: NOOP*10,RIGHT*5. The last one repeats.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: as in training.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the stream to this file; --resume continues it.")] = None,
    options: StreamOptions,
):
    """Draw a video frame by frame. Each frame is shown or written as soon as it is finished."""
    from ..media import open_writer
    from ..media.frames import tile
    from ..media.video import ffplay_command
    from ..play import script

    network, settings = load_video_model(checkpoint, options.device)
    data, endless = settings["data"], out in ("-", "window")
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    chosen = None
    if options.resume is None and labels is not None:
        chosen = class_numbers(labels, data["classes"])
    elif options.resume is None and network.n_classes:
        chosen = [0] if data["actions"] else list(range(min(10, network.n_classes)))
    video = options.open(network, settings, chosen)
    if actions is not None and not data["actions"]:
        raise ValueError(f"actions: {checkpoint} is no model of actions; it has --labels {', '.join(data['classes'])}")
    pressed = [] if actions is None else script(actions, data["classes"])
    typer.echo(f"the stream remembers {video.nbytes:,} bytes, and will after every frame", err=True)
    fps = fps or data["fps"]
    if out == "window":
        return _show(video, fps, frames, checkpoint)
    last = frames if frames is not None or endless else 64
    with open_writer(out, fps) as writer:
        number = 0
        while number != last:
            drawn = video.next(None if not pressed else [pressed[min(number, len(pressed) - 1)]] * video.batch)
            for frame in drawn.float().cpu().unbind(2):
                picture = tile(frame)
                if out == "-" and number == 0:
                    typer.echo(f"to watch, pipe into: {ffplay_command(*picture.shape[1:], fps)}", err=True)
                writer.add(picture)
            number += 1
    if save is not None:
        video.save(save)
    typer.echo(f"{number} frames in {out}", err=True)


def _show(video, fps, frames, checkpoint):
    """Show the stream in a window and ignore the keys."""
    from ..play import Window, play

    if video.batch > 1:
        raise ValueError(f"labels: a window shows one video, got {video.batch}; choose one class")
    with Window(f"PoM: {checkpoint.parent.name}") as window:
        typer.echo(play(video, window, fps=fps, frames=frames), err=True)


class Screen(str, Enum):
    """Where `play` shows its frames."""

    browser = "browser"
    window = "window"
    none = "none"


def play(
    checkpoint: VideoCheckpoint,
    *,
    screen: Annotated[Screen, typer.Option(help="A local web page, a window, or none: print times only.")] = "browser",
    actions: Annotated[
        str | None, typer.Option(help="Actions to play in place of the keys, then end: NOOP*10,RIGHT*5.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames after which to end.")] = None,
    fps: Annotated[float | None, typer.Option(help="Maximum frames per second.")] = 30.0,
    port: Annotated[int, typer.Option(help="Port of the web page; 0 picks a free port.")] = 0,
    options: PlayOptions,
):
    """Play: every frame answers to the keys that are pressed while it is drawn."""
    from ..play import Browser, Terminal, Window, script
    from ..play import play as run

    network, settings = load_video_model(checkpoint, options.device)
    classes = settings["data"]["classes"]
    video = options.open(network, settings)
    pressed = None if actions is None else script(actions, classes)
    title = f"PoM: {checkpoint.parent.name}"
    if screen == Screen.browser:
        shown = Browser(classes, title=title, port=port)
    else:
        shown = Window(title) if screen == Screen.window else Terminal()
    video.fork().next([0] if network.n_classes else None)  # the first evaluation is slow: do it before the player waits
    with shown:
        if screen == Screen.browser:
            typer.echo(f"open {shown.url} to play; Ctrl-C ends")
        statistics = run(video, shown, classes, script=pressed, fps=fps, frames=frames)
    typer.echo(f"{statistics}; remembered {video.nbytes:,} bytes")


def export(
    checkpoint: VideoCheckpoint,
    out: Annotated[
        Path, typer.Option(help="Safetensors file to write, for the C++ engine without torch (examples/stream.cpp).")
    ] = Path("engine.safetensors"),
    aoti: Annotated[
        Path | None, typer.Option(help="Instead of --out, compile one frame step for libtorch into this .pt2 file.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the compiled frame step: cpu or cuda.")] = "cpu",
):
    """Write a video model for programs in C++: its weights for the engine, or a compiled package for libtorch."""
    if aoti is None:
        from ..export import export_model

        export_model(checkpoint, out)
    else:
        from ..diffusion.context import stream_context
        from ..export import export_frame_step

        model, settings = load_video_model(checkpoint, device)
        context = stream_context(settings["train"]["context"])
        export_frame_step(model, aoti, objective=trained_objective(settings), context=context)
    typer.echo(f"wrote {out if aoti is None else aoti}", err=True)
