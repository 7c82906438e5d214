"""The commands that draw from a checkpoint: sample images, stream videos, play a game."""

from pathlib import Path
from typing import Annotated

import typer

from .common import chosen_device, class_numbers


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A model.safetensors of train or demo.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("samples.png"),
    labels: Annotated[
        str | None, typer.Option(help="Names or numbers of classes: 3,7. Default: the first ten.")
    ] = None,
    per_label: Annotated[int, typer.Option(help="Images per class.")] = 8,
    size: Annotated[int | None, typer.Option(help="Width in pixels; without it, as trained.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; 30, with meanflow 1.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Strength of classifier-free guidance; 3, and 1 is none. With meanflow: as trained."),
    ] = None,
    solver: Annotated[str, typer.Option(help="euler or heun.")] = "euler",
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda where the build has kernels for it; without it, the faster one.")
    ] = None,
):
    """Draw images from a checkpoint as a grid, one row per class."""
    import torch

    from ..diffusion import build_objective
    from ..diffusion.objectives import noise_shift
    from ..media.figures import save_grid
    from ..models.checkpoint import load_model
    from ..sampling import sample as draw

    if per_label < 1:
        raise ValueError(f"per-label: expected at least 1, got {per_label}")
    network, settings = load_model(checkpoint, device=chosen_device(device))
    if settings.get("architecture") == "VideoDiT":
        raise ValueError(f"checkpoint: {checkpoint} is a video model; draw from it with: pom-ext stream {checkpoint}")
    classes = settings["data"]["classes"]
    chosen = list(range(min(10, len(classes)))) if labels is None else class_numbers(labels, classes)
    channels, trained, _ = settings["data"]["shape"]
    size = trained if size is None else size
    objective, shift = settings["train"]["objective"], settings["train"]["shift"]
    if objective != "noise":  # noise prediction is bound to the noise levels it was trained on
        shift *= noise_shift(size * size, trained * trained)
    images = draw(
        network, torch.tensor(chosen).repeat_interleave(per_label), shape=(channels, size, size),
        objective=build_objective(objective, shift), steps=steps, guidance=guidance, solver=solver, seed=seed, progress=True,
    )  # fmt: skip
    save_grid(images, [classes[label] for label in chosen], out)
    typer.echo(f"{len(images)} images in {out}")
