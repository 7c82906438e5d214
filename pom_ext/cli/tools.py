"""The commands demo, bench and doctor."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Seed


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    image_seconds: Annotated[float, typer.Option(help="Training time of the image model.")] = 105.0,
    video_seconds: Annotated[float, typer.Option(help="Training time of the video model.")] = 375.0,
    seed: Seed = 0,
):
    """Train on MNIST, draw digits, and stream moving digits as video; a classifier checks the results."""
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
    """Run the benchmarks of the source tree. All arguments are passed to benchmarks/run.py."""
    source = Path(__file__).resolve().parents[2]
    if not (source / "benchmarks" / "run.py").is_file():
        raise ValueError(
            f"bench: the benchmarks are part of the source tree, and there is no {source}/benchmarks/run.py; "
            "run from a clone"
        )
    command = [sys.executable, "-m", "benchmarks.run", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=source, check=False).returncode)


def doctor(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE",
            help="With --explain: form, dim, degree, heads, batch, tokens, device, dtype, memory, mode, train.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell which implementation a layer's call takes, and why not the others.")
    ] = False,
):
    """Print what is installed, how the library was built, and whether it fits this machine.

    The exit code is 1 if the compiled library does not load or does not fit.

    With --explain, make one call of a layer instead: pom-ext doctor --explain form=power dim=1024 tokens=4096 train=yes
    """
    from .doctor import diagnose
    from .explain import explain as explained

    if explain:
        for line in explained(settings or []):
            typer.echo(line)
        return
    if settings:
        raise ValueError(f"{settings[0]}: expected --explain before the settings of a call")
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
