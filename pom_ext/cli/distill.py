"""The command distill."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .common import interrupts, new_checkpoint, report_training
from .options import Seed, VideoCheckpoint


@dataclass
class DistillOptions:
    """What the student learns, and how. What is left out is as it was for the teacher."""

    guidance: Annotated[
        float | None, typer.Option(help="Guidance of the teacher, trained in; 1: none. Default: 2; without classes 1.")
    ] = None
    context: Annotated[
        str | None, typer.Option(help="clean, or self: partly behind frames that the new model drew itself.")
    ] = None
    context_noise: Annotated[float | None, typer.Option(help="Most noise in finished frames, 0 to 1.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Clips per step and process.")] = None
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None
    ema_decay: Annotated[float | None, typer.Option(help="Decay per step of the averaged weights.")] = None
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False
    seed: Seed = 0


def distill(
    checkpoint: VideoCheckpoint,
    *,
    data: Annotated[str, typer.Option(help="What the model was trained on: moving-digits, game:pong, or a folder.")],
    workers: Annotated[int, typer.Option(help="Processes that load the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and loss.png.")] = Path("out/distill"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")] = False,
    steps: Annotated[int, typer.Option(help="Solver steps for a frame that the new model draws with: 1 or 2.")] = 1,
    train_steps: Annotated[int | None, typer.Option(help="Training steps, those before --resume included.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Training time, in place of --train-steps.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    options: DistillOptions,
):
    """Train a video model that draws each frame in one step, from a model that needs many."""
    from ..data import open_video_dataset
    from ..training import distill as run
    from ..training.distillation import distill_config, load_teacher

    if (train_steps is None) == (seconds is None):
        raise ValueError(
            f"train-steps, seconds: expected one of the two, got train-steps={train_steps}, seconds={seconds}; --steps "
            "are those of the solver"
        )
    target = new_checkpoint(out, resume)
    settings = load_teacher(checkpoint)[1]
    _, frames, _, side = settings["data"]["shape"]
    dataset = open_video_dataset(data, frames, side)
    config = distill_config(settings, **{name: value for name, value in vars(options).items() if value is not None})
    length = {"steps": train_steps, "seconds": seconds, "resume": resume, "save_every": save_every}
    with interrupts(target):
        result = run(checkpoint, dataset, target, config, draw_steps=steps, **length, workers=workers)
    report_training(result, target, f"pom-ext stream {target} --steps {steps}")
