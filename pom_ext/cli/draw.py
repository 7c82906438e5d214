"""The command sample."""

from pathlib import Path
from typing import Annotated

import typer

from .common import choose_device, class_numbers, trained_objective
from .options import Checkpoint, Device, Labels, Seed, Solver


def sample(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("samples.png"),
    labels: Labels = None,
    per_label: Annotated[int, typer.Option(help="Images per class.")] = 8,
    size: Annotated[int | None, typer.Option(help="Width in pixels. Default: the width in training.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps. Default: 30; for meanflow 1.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of guidance; 1: none. Default: 3; for meanflow as trained.")
    ] = None,
    solver: Solver = "euler",
    seed: Seed = 0,
    device: Device = None,
):
    """Draw images from a checkpoint as a grid, one row per class."""
    import torch

    from ..media.figures import save_grid
    from ..models.checkpoint import load_model
    from ..sampling import sample as draw

    if per_label < 1:
        raise ValueError(f"per-label: expected at least 1, got {per_label}")
    network, settings = load_model(checkpoint, device=choose_device(device))
    if settings.get("architecture") == "VideoDiT":
        raise ValueError(f"checkpoint: {checkpoint} is a video model; draw from it with: pom-ext stream {checkpoint}")
    classes = settings["data"]["classes"]
    chosen = list(range(min(10, len(classes)))) if labels is None else class_numbers(labels, classes)
    channels, trained, _ = settings["data"]["shape"]
    size = trained if size is None else size
    objective = trained_objective(settings).for_resolution(size * size, trained * trained)
    options = {"steps": steps, "guidance": guidance, "solver": solver, "seed": seed, "progress": True}
    labels, shape = torch.tensor(chosen).repeat_interleave(per_label), (channels, size, size)
    images = draw(network, labels, shape=shape, objective=objective, **options)
    save_grid(images, [classes[label] for label in chosen], out)
    typer.echo(f"{len(images)} images in {out}")
