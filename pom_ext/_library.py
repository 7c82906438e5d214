"""Loads the compiled library. Importing never fails or prints: what went wrong is raised by the call that needs it."""

import importlib
from pathlib import Path

import torch

BUILD = "pip install --no-build-isolation -e ."


def _load():
    """Register the operations with torch; the error with its remedy where that fails."""
    try:
        importlib.import_module("pom_ext._C")
    except ModuleNotFoundError:
        return f"pom_ext: {Path(__file__).parent} holds no compiled library. Build it from the source folder: {BUILD}"
    except ImportError as error:
        return (
            f"pom_ext: the compiled library does not load under torch {torch.__version__} ({error}). "
            f"Build it again for this torch, from the source folder: {BUILD}"
        )
    return None


ERROR = _load()
CUDA = "" if ERROR else torch.ops.pom_ext.cuda_architectures()  # that the library holds code for: "8.0;9.0+PTX"
DEVICES = ("cpu", "cuda") if CUDA else ("cpu",)  # that the library has kernels for


def default_device():
    """The fastest device that is here and that there are kernels for."""
    return "cuda" if "cuda" in DEVICES and torch.cuda.is_available() else "cpu"


def load():
    """Raises ImportError with the remedy where there is no compiled library."""
    if ERROR is not None:
        raise ImportError(ERROR)
