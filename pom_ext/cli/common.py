"""What the commands share: errors as one line, the device, names of classes."""

import functools
import os
import sys

import typer


def one_line_errors(command):
    """Report mistakes that a user can mend as one line on stderr and exit code 1; anything else is a bug."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            message = f"{error}; the commands need more than the library: pip install 'pom_ext[train,play]'"
        except BrokenPipeError:  # whoever read the output has seen enough; nothing of it may be left to write at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None
        except (ValueError, ArithmeticError, OSError) as error:
            message = str(error)
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(1)

    return run


def chosen_device(device):
    """The device asked for, or the best there is; ValueError where this build or machine lacks it."""
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
    """Class numbers for "3,cat": names first, since the names of classes can be numbers too."""
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
