"""Loads the compiled library. Importing never fails or prints: what went wrong is raised by the call that needs it."""

import importlib
import json
import re
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]
BUILD = "pip install --no-build-isolation -e ."
BUILD_CUDA = f"POM_EXT_CUDA=1 {BUILD}"  # for the GPUs that are visible, or without any for all
MINIMUM_TORCH = "2.10"  # whose stable ABI the library is built for: TORCH_TARGET in setup.py


def build_note():
    """What setup.py wrote down of the build (tools/build/note.py), or {} if nothing was built or the note is damaged."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _load():
    """Register the operations with torch; the error with its remedy where that fails."""
    if _numbers(torch.__version__) < _numbers(MINIMUM_TORCH):
        # Not left to the loader: what such a torch lacks would be missed in the middle of a call, and end the process.
        return (
            f"pom_ext: torch {torch.__version__} is too old: {MINIMUM_TORCH} or later is needed. Update it with "
            f"pip install 'torch>={MINIMUM_TORCH}'; the library need not be built again"
        )
    try:
        importlib.import_module("pom_ext._C")
    except ModuleNotFoundError:
        return f"pom_ext: {PACKAGE} holds no compiled library. Build it from the source folder: {BUILD}"
    except ImportError as error:
        return (
            f"pom_ext: the compiled library does not load under torch {torch.__version__} ({error}). `pom-ext doctor` "
            f"tells what it was built for. Build it again on this machine, from the source folder: {BUILD}"
        )
    return None


def _numbers(version):
    """(2, 10) of "2.10.0a0+cpu": a torch built from source counts as the release that it leads to."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


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
