"""Fixtures of every test: a fixed seed, and the device axis."""

import os

# Thousands of small calls: threads that spin while they wait make them ten times slower on a machine that is in use.
# Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import tested_library  # noqa: F401 -- before pom_ext
import torch
from hypothesis import settings

from pom_ext.ops import _library

DEVICES = [device for device in _library.DEVICES if device == "cpu" or torch.cuda.is_available()]

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cmake_library(tmp_path_factory):
    """The torch-free library as CMake builds and installs it: (folder of the build, of the installation, flags).

    Where the operations run on a GPU here, with CUDA for that one.
    """
    from cpp_programs import ROOT, call

    folder = tmp_path_factory.mktemp("cmake")
    build, prefix = folder / "build", folder / "prefix"
    on_gpu = _library.default_device() == "cuda"
    flags = ["-DPOM_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"] if on_gpu else ["-DPOM_CUDA=OFF"]
    call("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
         "-DCMAKE_INSTALL_LIBDIR=lib", *flags)  # fmt: skip
    call("cmake", "--build", build)
    call("cmake", "--install", build, "--prefix", prefix)
    return build, prefix, flags
