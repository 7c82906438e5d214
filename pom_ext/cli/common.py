"""Helpers of several commands: errors in one line, devices, classes, checkpoints."""

import contextlib
import functools
import os
import sys

import typer


def friendly_errors(command):
    """Report errors that a user can fix in one line on stderr, with exit code 1. Other exceptions are bugs and pass."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            message = f"{error}; the commands need more than the library: pip install 'pom_ext[train,play]'"
        except BrokenPipeError:  # the reader closed the pipe; leave Python nothing to flush into it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None
        except (ValueError, ArithmeticError, OSError) as error:
            message = str(error)
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(1)

    return run


def choose_device(device):
    """The requested device, or the fastest available one for None.

    Raises:
        ValueError: this build or this machine does not have the device.
    """
    import torch

    from ..ops import _library

    if device is None:
        return _library.default_device()
    if device not in _library.DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device: expected {_library.default_device()}, which this build and machine have, got {device}"
        )
    return device


def class_numbers(labels, classes):
    """Class numbers of "3,cat". Names have priority over numbers, since a class can be named "7"."""
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


def parse_size(size):
    """(height, width) of "48x64", None of None."""
    if size is None:
        return None
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"size: expected height x width such as 48x64, got {size!r}")
    return tuple(map(int, parts))


def new_checkpoint(out, resume):
    """The checkpoint file in the folder `out`; ValueError if there is one, and it is not to be resumed."""
    checkpoint = out / "model.safetensors"
    if checkpoint.exists() and not resume:
        raise ValueError(f"out: {checkpoint} exists; add --resume to go on from it, or choose another --out")
    return checkpoint


@contextlib.contextmanager
def interrupts(checkpoint):
    """Let Ctrl-C end a training with exit code 130, and say what is left of it."""
    try:
        yield
    except KeyboardInterrupt:
        saved = f"--resume goes on from {checkpoint}" if checkpoint.exists() else "no checkpoint was due yet"
        typer.echo(f"interrupted; {saved}", err=True)
        raise typer.Exit(130) from None


def report_training(result, checkpoint, use):
    """Draw the loss beside the checkpoint, and say how long the training took and how to use the model."""
    from ..media.figures import save_loss_curve

    save_loss_curve(result.losses, checkpoint.parent / "loss.png")
    typer.echo(f"{len(result.losses)} steps in {result.seconds:.0f} s; draw from it with: {use}")


def load_video_model(checkpoint, device):
    """`load_model`; raises ValueError for an image model."""
    from ..models.checkpoint import load_model

    network, settings = load_model(checkpoint, device=choose_device(device))
    if settings.get("architecture") != "VideoDiT":
        raise ValueError(f"checkpoint: {checkpoint} is an image model; draw from it with: pom-ext sample {checkpoint}")
    return network, settings


def trained_objective(settings):
    """The objective that the model of a checkpoint was trained with."""
    from ..diffusion import build_objective

    return build_objective(settings["train"]["objective"], settings["train"]["shift"])
