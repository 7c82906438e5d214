"""The commands that draw video from a checkpoint: stream to a file, a window or standard output, and play."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import chosen_device, class_numbers

Steps = Annotated[int, typer.Option(help="Solver steps of a frame.")]
Guidance = Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 is none.")]
Seed = Annotated[int, typer.Option(help="Seed of the frames.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, or cuda where the build has kernels for it; without it, the faster one.")
]
ContextNoise = Annotated[float, typer.Option(help="Noise in remembered frames, 0 to 1 as in training; against drift.")]
Window = Annotated[int, typer.Option(help="Forget what is older than so many frames; 0: nothing.")]
Decay = Annotated[float, typer.Option(help="Every frame counts this much less with each later one; 1: all alike.")]


def stream(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a video model.")],
    out: Annotated[
        str, typer.Option(help="A .mp4, .gif or .png (contact sheet) file; window; or - for raw rgb24 video.")
    ] = "clip.mp4",
    frames: Annotated[
        int | None, typer.Option(help="Frames to draw; without it 64, and no end in a window or -.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Names or numbers of classes: 3,7, a video each, side by side.")
    ] = None,
    actions: Annotated[
        str | None, typer.Option(help="Actions of a game, one after the other: NOOP*10,RIGHT*5; the last one stays.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Height x width, 48x64; without it, as trained.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file; without it, as trained.")] = None,
    steps: Steps = 8,
    guidance: Guidance = 1.0,
    solver: Annotated[str, typer.Option(help="euler or heun.")] = "euler",
    seed: Seed = 0,
    context_noise: ContextNoise = 0.0,
    window: Window = 0,
    decay: Decay = 1.0,
    save: Annotated[Path | None, typer.Option(help="Keep the stream in this file, to go on from later.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on from a kept stream, with its settings.")] = None,
    device: Device = None,
):
    """Draw a video frame after frame, each shown or written as soon as it is finished."""
    from ..media import open_writer
    from ..media.video import ffplay_command, tile
    from ..play import script
    from ..streaming import VideoStream

    network, settings = load_video_model(checkpoint, device)
    data, endless = settings["data"], out in ("-", "window")
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    if resume is not None:
        video = VideoStream.load(resume, network)
    else:
        chosen = None if labels is None else class_numbers(labels, data["classes"])
        if chosen is None and network.n_classes:
            chosen = [0] if data["actions"] else list(range(min(10, network.n_classes)))
        video = VideoStream(
            network, chosen, context=settings["train"]["context"], objective=objective_of(settings), steps=steps,
            guidance=guidance, solver=solver, seed=seed, size=parsed_size(size), context_noise=context_noise, window=window,
            decay=decay,
        )  # fmt: skip
    if actions is not None and not data["actions"]:
        raise ValueError(f"actions: {checkpoint} is no model of actions; it has --labels {', '.join(data['classes'])}")
    wanted = [] if actions is None else script(actions, data["classes"])
    typer.echo(f"the stream remembers {video.nbytes:,} bytes, and will after every frame", err=True)
    if out == "window":
        return _show(video, fps or data["fps"], frames, checkpoint)
    left = frames if frames is not None or endless else 64
    fps = fps or data["fps"]
    with open_writer(out, fps) as writer:
        number = 0
        while number != left:
            drawn = video.next(None if not wanted else [wanted[min(number, len(wanted) - 1)]] * video.batch)
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
    """The stream in a window, without keys that mean anything."""
    from ..play import Window as PlayWindow
    from ..play import play as run

    if video.batch > 1:
        raise ValueError(f"labels: a window shows one video, got {video.batch}; choose one class")
    with PlayWindow(f"PoM: {checkpoint.parent.name}") as shown:
        typer.echo(run(video, shown, fps=fps, frames=frames), err=True)


class Screen(str, Enum):
    """Where `play` shows its frames."""

    browser = "browser"
    window = "window"
    none = "none"


def play(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of a video model, of a game best of all.")],
    screen: Annotated[
        Screen, typer.Option(help="A page on this machine, a window, or none: only the times.")
    ] = "browser",
    actions: Annotated[
        str | None, typer.Option(help="Press these instead of the keys: NOOP*10,RIGHT*5. Then end.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="End after so many frames.")] = None,
    fps: Annotated[float | None, typer.Option(help="At most so many frames a second.")] = 30.0,
    port: Annotated[int, typer.Option(help="Of the page; 0 takes a free one.")] = 0,
    size: Annotated[str | None, typer.Option(help="Height x width, 48x64; without it, as trained.")] = None,
    steps: Steps = 4,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    context_noise: ContextNoise = 0.0,
    window: Window = 0,
    decay: Decay = 1.0,
    resume: Annotated[Path | None, typer.Option(help="Begin where this kept stream stands, with its settings.")] = None,
    device: Device = None,
):
    """Play: every frame answers to the keys that are pressed while it is drawn."""
    from ..play import Browser, Terminal, script
    from ..play import Window as PlayWindow
    from ..play import play as run
    from ..streaming import VideoStream

    network, settings = load_video_model(checkpoint, device)
    classes = settings["data"]["classes"]
    if resume is not None:
        video = VideoStream.load(resume, network)
    else:
        video = VideoStream(
            network, context=settings["train"]["context"], objective=objective_of(settings), steps=steps,
            guidance=guidance, seed=seed, size=parsed_size(size), context_noise=context_noise, window=window, decay=decay,
        )  # fmt: skip
    wanted = None if actions is None else script(actions, classes)
    title = f"PoM: {checkpoint.parent.name}"
    if screen == Screen.browser:
        shown = Browser(classes, title=title, port=port)
    else:
        shown = PlayWindow(title) if screen == Screen.window else Terminal()
    video.fork().next([0] if network.n_classes else None)  # the first evaluation is slow, and nobody should wait for it
    with shown:
        if screen == Screen.browser:
            typer.echo(f"open {shown.url} to play; Ctrl-C ends")
        statistics = run(video, shown, classes, script=wanted, fps=fps, frames=frames)
    typer.echo(f"{statistics}; remembered {video.nbytes:,} bytes")


def objective_of(settings):
    """What the model of a checkpoint was trained for."""
    from ..diffusion import build_objective

    return build_objective(settings["train"]["objective"], settings["train"]["shift"])


def load_video_model(checkpoint, device):
    """`load_model`, and ValueError where it is a model of images."""
    from ..models.checkpoint import load_model

    network, settings = load_model(checkpoint, device=chosen_device(device))
    if settings.get("architecture") != "VideoDiT":
        raise ValueError(f"checkpoint: {checkpoint} is an image model; draw from it with: pom-ext sample {checkpoint}")
    return network, settings


def parsed_size(size):
    """ "48x64" as (48, 64)."""
    if size is None:
        return None
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"size: expected height x width such as 48x64, got {size!r}")
    return tuple(map(int, parts))
