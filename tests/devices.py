"""The devices that tests run on: those that the library has kernels for and that are here."""

import tested_library  # noqa: F401 -- before pom_ext
import torch

from pom_ext.ops import _library

DEVICES = [device for device in _library.DEVICES if device == "cpu" or torch.cuda.is_available()]
