"""The command train, for images and for video."""

from pathlib import Path
from typing import Annotated

import typer

SMALL = {"patch": 4, "dim": 96, "n_layers": 4, "n_heads": 8}  # without --model


def train(
    data: Annotated[
        str,
        typer.Option(
            help="mnist, or a folder with one sub-folder of pictures per class; of video: moving-digits, game:pong (or "
            "another game), or with --frames a folder of videos."
        ),
    ] = "mnist",
    size: Annotated[int | None, typer.Option(help="Width in pixels that pictures and videos are scaled to.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip of video.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and loss.png.")] = Path("out/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="Start a video model from this checkpoint of an image model.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train, counted from the first run.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time to train, instead of --steps.")] = None,
    model: Annotated[str | None, typer.Option(help="S/2 to XL/8; without it, the small model of the demo.")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a patch, in pixels.")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the tokens.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of the mixer.")] = None,
    mixer: Annotated[str, typer.Option(help="product, power, attention, local; or one per layer: power,...")] = "power",
    degree: Annotated[int | None, typer.Option(help="Degree of the polynomial.")] = None,
    local_conv: Annotated[
        bool, typer.Option(help="A depthwise convolution of 3 patches a side in every block.")
    ] = True,
    objective: Annotated[
        str, typer.Option(help="flow (matching), noise (prediction), or meanflow: images drawn in one step.")
    ] = "flow",
    guidance: Annotated[
        float | None, typer.Option(help="meanflow: strength of the guidance that is trained in; 2, and 1 is none.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Noise shift; without it, from the size.")] = None,
    context: Annotated[
        str, typer.Option(help="Video: clean (finished frames before a noisy one) or shared (noise).")
    ] = "clean",
    context_noise: Annotated[
        float, typer.Option(help="Video: most noise in finished frames, 0 to 1; against drift.")
    ] = 0.5,
    batch_size: Annotated[
        int | None, typer.Option(help="Images or clips per step and process; 32 images, 8 clips.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; without it, 0.4 / width of tokens.")] = None,
    ema_decay: Annotated[float, typer.Option(help="Decay of the average of the weights, per step.")] = 0.999,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    workers: Annotated[int, typer.Option(help="Processes that read the data.")] = 0,
):
    """Train an image or a video model. Interrupt it at any time; --resume goes on from the last checkpoint."""
    import torch

    from ..data import open_dataset, open_video_dataset
    from ..data.videos import is_video
    from ..diffusion.objectives import noise_shift
    from ..media.figures import save_loss_curve
    from ..training import TrainConfig
    from ..training import train as run_training

    checkpoint = out / "model.safetensors"
    if checkpoint.exists() and not resume:
        raise ValueError(f"out: {checkpoint} exists; add --resume to go on from it, or choose another --out")
    video = is_video(data) or frames is not None
    dataset = open_video_dataset(data, frames, size) if video else open_dataset(data, size)
    one_step = objective == "meanflow"
    if video and one_step:
        raise ValueError("objective: meanflow is for images; expected flow or noise for video")
    given = {"patch": patch, "dim": dim, "n_layers": layers, "n_heads": heads, "degree": degree}
    options = {
        "local_conv": local_conv, "mixer": mixer.split(",") if "," in mixer else mixer,
        **{name: value for name, value in given.items() if value is not None}, **({"two_times": True} if one_step else {}),
    }  # fmt: skip
    torch.manual_seed(seed)
    network = _video_network(dataset, model, start, options) if video else _image_network(dataset, model, options)
    pixels = dataset.shape[-1] * dataset.shape[-2]
    config = TrainConfig(
        objective=objective, shift=noise_shift(pixels) if shift is None else shift, context=context,
        guidance=(2.0 if one_step else 1.0) if guidance is None else guidance,
        context_noise=context_noise if video else 0.0, batch_size=(8 if video else 32) if batch_size is None else batch_size,
        lr=0.4 / network.config["dim"] if lr is None else lr, ema_decay=ema_decay, bf16=bf16, seed=seed,
    )  # fmt: skip
    try:
        result = run_training(
            network, dataset, checkpoint, config,
            steps=steps, seconds=seconds, resume=resume, save_every=save_every, workers=workers,
        )  # fmt: skip
    except KeyboardInterrupt:
        saved = f"--resume goes on from {checkpoint}" if checkpoint.exists() else "no checkpoint was due yet"
        typer.echo(f"interrupted; {saved}", err=True)
        raise typer.Exit(130) from None
    save_loss_curve(result.losses, out / "loss.png")
    use = "stream" if video else "sample"
    typer.echo(f"{len(result.losses)} steps in {result.seconds:.0f} s; draw from it with: pom-ext {use} {checkpoint}")


def _image_network(dataset, model, options):
    from ..models import ImageDiT, image_dit

    channels, side, _ = dataset.shape
    options |= {"in_channels": channels, "n_classes": len(dataset.classes), "image_size": side}
    return ImageDiT(**{**SMALL, **options}) if model is None else image_dit(model, **options)


def _video_network(dataset, model, start, options):
    from ..convert import inflate
    from ..models import VideoDiT, video_dit
    from ..models.checkpoint import load_model

    channels, frames, *size = dataset.shape
    if start is not None:
        if model is not None:
            raise ValueError("start and model: the image model says what the video model is; give one of them")
        network = inflate(load_model(start)[0].train(), length=frames, size=size)
        given = network.config["in_channels"], network.config["n_classes"]
        if given != (channels, len(dataset.classes)):
            raise ValueError(
                f"start: {start} is a model of {given[0]} channels and {given[1]} classes, the videos have {channels} and "
                f"{len(dataset.classes)}"
            )
        return network
    options |= {"in_channels": channels, "n_classes": len(dataset.classes), "size": size, "length": frames}
    options["positions"] = "space"  # a stream has no end
    if isinstance(options.get("patch"), int):
        options["patch"] = (1, options["patch"], options["patch"])
    if model is None:
        return VideoDiT(**{**SMALL, "patch": (1, SMALL["patch"], SMALL["patch"]), **options})
    return video_dit(model, **options)
