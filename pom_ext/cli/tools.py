"""The commands demo, bench and doctor."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results of this demo.")] = Path("out/demo"),
    image_seconds: Annotated[float, typer.Option(help="Training time of the image model.")] = 150.0,
    video_seconds: Annotated[float, typer.Option(help="Training time of the video model.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, training and samples.")] = 0,
):
    """Learn the MNIST digits, draw them, move them, stream them as video; a classifier reads what comes out."""
    from ..demo import run_demo

    report = run_demo(out, image_seconds=image_seconds, video_seconds=video_seconds, seed=seed)
    images, video = report["images"], report["video"]
    share, count = images["samples_read_as_requested"], images["sampling"]["images"]
    typer.echo(f"images: a classifier read the requested digit in {share:.1%} of {count} samples")
    within, beyond = video["read_within_the_trained_length"], video["read_at_twice_the_trained_length"]
    typer.echo(f"video: in {within:.1%} of the frames within the trained length, in {beyond:.1%} at twice that length")
    typer.echo(
        f"see report.md, samples.png, video.gif and stream.png in {out} ({report['total_seconds']:.0f} s in all)"
    )


def bench(context: typer.Context):
    """Run the benchmarks of the source tree; arguments go to benchmarks/run.py."""
    source = Path(__file__).resolve().parents[2]
    if not (source / "benchmarks" / "run.py").is_file():
        raise ValueError(
            f"bench: the benchmarks are part of the source tree, and there is no {source}/benchmarks/run.py; "
            "run from a clone"
        )
    command = [sys.executable, "-m", "benchmarks.run", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=source, check=False).returncode)


def doctor():
    """Print what is installed, what was built and what runs here.

    Exit code 1 if the compiled library does not load, or does not fit what is here.
    """
    from .doctor import diagnose

    fits = True
    try:
        for line in diagnose():
            typer.echo(line)
            fits = fits and not line.startswith("mismatch")
    except (ImportError, OSError) as error:
        typer.echo(f"library    not loaded: {type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    if not fits:
        raise typer.Exit(1)
