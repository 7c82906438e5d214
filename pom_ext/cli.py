"""The command `pom-ext`: demo, train, sample, bench, doctor."""

import functools
import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="PoM: train and sample diffusion transformers whose cost is linear in tokens.", no_args_is_help=True
)
SMALL = {"patch": 4, "dim": 96, "n_layers": 4, "n_heads": 8}  # without --model


def one_line_errors(command):
    """Report mistakes that a user can mend as one line on stderr and exit code 1; anything else is a bug."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            message = f"{error}; the commands need more than the library: pip install 'pom_ext[train]'"
        except (ValueError, ArithmeticError, OSError) as error:
            message = str(error)
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(1)

    return run


@app.command()
@one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results of this demo.")] = Path("out/demo"),
    seconds: Annotated[float, typer.Option(help="Training time. The rest takes about a minute on two cores.")] = 220.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, training and samples.")] = 0,
):
    """Train on the MNIST images, draw all ten digits, and have a classifier read them."""
    from .demo import run_demo

    report = run_demo(out, seconds=seconds, seed=seed)
    share, count = report["samples_read_as_requested"], report["sampling"]["images"]
    typer.echo(f"a classifier read the requested digit in {share:.1%} of {count} samples")
    typer.echo(f"see {out}/samples.png, loss.png and report.md ({report['total_seconds']:.0f} s in all)")


@app.command()
@one_line_errors
def train(
    data: Annotated[str, typer.Option(help="mnist, or a folder with one sub-folder of pictures per class.")] = "mnist",
    size: Annotated[int | None, typer.Option(help="Width in pixels that pictures of a folder are scaled to.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and loss.png.")] = Path("out/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps to train, counted from the first run.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time to train, instead of --steps.")] = None,
    model: Annotated[str | None, typer.Option(help="S/2 to XL/8; without it, the small model of the demo.")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a patch, in pixels.")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the tokens.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of the mixer.")] = None,
    mixer: Annotated[str, typer.Option(help="product, power, attention, local; or one per layer: power,...")] = "power",
    degree: Annotated[int | None, typer.Option(help="Degree of the polynomial.")] = None,
    local_conv: Annotated[bool, typer.Option(help="A 3x3 depthwise convolution in every block.")] = True,
    objective: Annotated[str, typer.Option(help="flow (matching) or noise (prediction).")] = "flow",
    shift: Annotated[float | None, typer.Option(help="Noise shift; without it, from the size.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step and process.")] = 32,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; without it, 0.4 / width of tokens.")] = None,
    ema_decay: Annotated[float, typer.Option(help="Decay of the average of the weights, per step.")] = 0.999,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    workers: Annotated[int, typer.Option(help="Processes that read pictures.")] = 0,
):
    """Train a class-conditional image model. Interrupt it at any time; --resume goes on from the last checkpoint."""
    import torch

    from .data import open_dataset
    from .diffusion import noise_shift
    from .models.image import ImageDiT, image_dit
    from .plots import save_loss_curve
    from .training import TrainConfig
    from .training import train as run_training

    checkpoint = out / "model.safetensors"
    if checkpoint.exists() and not resume:
        raise ValueError(f"out: {checkpoint} exists; add --resume to go on from it, or choose another --out")
    dataset = open_dataset(data, size)
    channels, side, _ = dataset.shape
    given = {"patch": patch, "dim": dim, "n_layers": layers, "n_heads": heads, "degree": degree}
    options = {
        "in_channels": channels, "n_classes": len(dataset.classes), "image_size": side, "local_conv": local_conv,
        "mixer": mixer.split(",") if "," in mixer else mixer,
        **{name: value for name, value in given.items() if value is not None},
    }  # fmt: skip
    torch.manual_seed(seed)
    network = ImageDiT(**{**SMALL, **options}) if model is None else image_dit(model, **options)
    config = TrainConfig(
        objective=objective, shift=noise_shift(side * side) if shift is None else shift, batch_size=batch_size,
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
    typer.echo(f"{len(result.losses)} steps in {result.seconds:.0f} s; draw from it with: pom-ext sample {checkpoint}")


@app.command()
@one_line_errors
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A model.safetensors of train or demo.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("samples.png"),
    labels: Annotated[
        str | None, typer.Option(help="Names or numbers of classes: 3,7. Default: the first ten.")
    ] = None,
    per_label: Annotated[int, typer.Option(help="Images per class.")] = 8,
    size: Annotated[int | None, typer.Option(help="Width in pixels; without it, as trained.")] = None,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance; 1 is none.")] = 3.0,
    solver: Annotated[str, typer.Option(help="euler or heun.")] = "euler",
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda where the build has kernels for it; without it, the faster one.")
    ] = None,
):
    """Draw images from a checkpoint as a grid, one row per class."""
    import torch

    from . import _library
    from .checkpoint import load_model
    from .diffusion import build_objective, noise_shift
    from .plots import save_grid
    from .sampling import sample as draw

    if per_label < 1:
        raise ValueError(f"per-label: expected at least 1, got {per_label}")
    device = device or _library.default_device()
    if device not in _library.DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device: expected {_library.default_device()}, which this build and machine have, got {device}"
        )
    network, settings = load_model(checkpoint, device=device)
    classes = settings["data"]["classes"]
    chosen = _class_numbers(labels, classes)
    channels, trained, _ = settings["data"]["shape"]
    size = trained if size is None else size
    objective, shift = settings["train"]["objective"], settings["train"]["shift"]
    if objective == "flow":  # noise prediction is bound to the noise levels it was trained on
        shift *= noise_shift(size * size, trained * trained)
    images = draw(
        network, torch.tensor(chosen).repeat_interleave(per_label), shape=(channels, size, size),
        objective=build_objective(objective, shift), steps=steps, guidance=guidance, solver=solver, seed=seed, progress=True,
    )  # fmt: skip
    save_grid(images, [classes[label] for label in chosen], out)
    typer.echo(f"{len(images)} images in {out}")


def _class_numbers(labels, classes):
    """Class numbers for "3,cat": names first, since the names of classes can be numbers too."""
    if labels is None:
        return list(range(min(10, len(classes))))
    numbers = []
    for label in labels.split(","):
        if label in classes:
            numbers.append(classes.index(label))
        elif label.isdecimal() and int(label) < len(classes):
            numbers.append(int(label))
        else:
            names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise ValueError(f"labels: no class {label!r}; expected some of {names}, or 0 to {len(classes) - 1}")
    return numbers


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
@one_line_errors
def bench(context: typer.Context):
    """Run the benchmarks of the source tree; arguments go to benchmarks/run.py."""
    source = Path(__file__).resolve().parents[1]
    if not (source / "benchmarks" / "run.py").is_file():
        raise ValueError(
            f"bench: the benchmarks are part of the source tree, and there is no {source}/benchmarks/run.py; "
            "run from a clone"
        )
    command = [sys.executable, "-m", "benchmarks.run", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=source, check=False).returncode)


@app.command()
def doctor():
    """Print what is installed, what was built and what runs here. Exit code 1 if the compiled library does not load."""
    import torch

    from . import __version__

    typer.echo(f"pom_ext    {__version__}, {Path(__file__).resolve().parent}")
    typer.echo(f"python     {platform.python_version()}, {platform.system()} {platform.machine()}")
    typer.echo(
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads, CPU {torch.backends.cpu.get_cpu_capability()}"
    )
    typer.echo(f"cuda       {_describe_cuda(torch)}")
    wanted = ("accelerate", "diffusers", "matplotlib", "mlxtend", "PIL", "tqdm")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    typer.echo(f"training   {'ready' if not missing else f'missing {missing}: pip install pom_ext[train]'}")
    try:
        from ._library import load

        load()
    except (ImportError, OSError) as error:
        typer.echo(f"library    not loaded: {type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    typer.echo(f"library    loaded, {importlib.util.find_spec('pom_ext._C').origin}")
    typer.echo(f"kernels    {_describe_kernels(torch)}")


def _describe_cuda(torch):
    if not torch.cuda.is_available():
        return "no GPU here" if torch.version.cuda else "none: this torch is built for the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _describe_kernels(torch):
    """What the library was built for, and whether that serves the GPUs that are here."""
    built = torch.ops.pom_ext.cuda_architectures()
    if not built:
        return "CPU only; for CUDA, build again with nvcc on the path"
    text = f"CPU, CUDA {built.replace(';', ', ')}"
    if not torch.cuda.is_available():
        return text
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    lacking = ["{}.{}".format(*capability) for capability in sorted(here) if not _serves(built, capability)]
    if not lacking:
        return f"{text}, which serves every GPU here"
    return f"{text}, NOT the GPU here: build again with TORCH_CUDA_ARCH_LIST='{';'.join(lacking)}'"


def _serves(built, capability):
    """Whether code for the architectures "8.0;9.0a;12.0+PTX" runs on a GPU of this (major, minor).

    Machine code runs on later minor versions too, PTX on everything later; an "a" binds both to the one GPU, an "f" to
    its family.
    """
    for name in built.split(";"):
        number, suffix, ptx = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", name).groups()
        major, minor = map(int, number.split("."))
        if suffix == "a":
            serves = capability == (major, minor)
        elif ptx and not suffix:
            serves = capability >= (major, minor)
        else:
            serves = capability[0] == major and capability[1] >= minor
        if serves:
            return True
    return False


def main():
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
