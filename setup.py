"""Builds the compiled library. What the package is and needs is in pyproject.toml."""

import os
import platform
import shutil
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file from a path of its own

from tools.build import cuda as build_cuda
from tools.build.library import LIBRARY, sources
from tools.build.note import refuse_older_torch, write_note
from tools.build.objects import Job, compile_stale

TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: this build serves that torch and later ones
INCLUDE = ["csrc", "csrc/include"]
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
X86 = platform.machine().lower() in LIBRARY["x86"]


def job(source, folder, name, flags=()):
    """A compilation of one source of the torch-free library."""
    patterns = ("*.h", "include/**/*.h", "cpu/*.h", "cuda/allocate.h", "engine/*.h")
    headers = tuple(path for pattern in patterns for path in Path("csrc").glob(pattern))
    command = [os.environ.get("CXX", "g++"), *COMMON, *(["-DPOM_X86"] if X86 else []), *(f"-I{i}" for i in INCLUDE)]
    return Job((*command, *flags), Path(source), folder / f"{name}.o", headers)


def cpu_jobs(folder):
    """The operations on a CPU: the inner loops once per instruction set, everything else once."""
    kernels, flags = LIBRARY["kernels"], LIBRARY["kernel_flags"]
    sets = {name: of_set for name, of_set in LIBRARY["instruction_sets"].items() if X86 or not of_set}
    jobs = [job(kernels, folder, f"kernels_{name}", flags + of_set) for name, of_set in sets.items()]
    return jobs + [job(source, folder, source.stem) for source in sources("cpu")]


def engine_jobs(folder, flags):
    """What the streaming engine has beside the operations."""
    return [job(source, folder / "engine", source.stem, flags) for source in sources("engine")]


class Build(BuildExtension):
    def run(self):
        super().run()
        library = Path(self.get_ext_fullpath("pom_ext._C"))
        version = self.distribution.get_version()
        compiler = os.environ.get("CXX", "g++")
        write_note(library.with_name("_build.json"), version, torch.__version__, TORCH_TARGET, compiler, self.cuda)

    def build_extensions(self):
        operations, engine = self.extensions
        folder = Path("build/pom")  # not pip's temporary folder: what has not changed is not compiled again
        jobs, engine_flags = cpu_jobs(folder), []
        self.cuda = build_cuda.choose()
        print(self.cuda, flush=True)
        toolkit, names = self.cuda.toolkit, self.cuda.names
        if toolkit:
            jobs, engine_flags = build_cuda.jobs(toolkit, names, folder / "cuda") + jobs, ["-DPOM_CUDA"]
            operations.define_macros += [("POM_CUDA_ARCHITECTURES", f'"{";".join(names)}"')]
            for extension in self.extensions:
                extension.define_macros += [("POM_CUDA", None)]
                extension.library_dirs += [str(toolkit.libraries)]
                extension.libraries += build_cuda.LIBRARIES
        objects = [str(path) for path in compile_stale(jobs + engine_jobs(folder, engine_flags))]
        operations.extra_objects += objects[: len(jobs)]
        engine.extra_objects += objects
        super().build_extensions()


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:  # a wheel packs this folder: files that are gone by now must not be left in it
            shutil.rmtree(Path(self.build_lib) / "pom_ext", ignore_errors=True)
        super().run()


refuse_older_torch(torch.__version__, TORCH_TARGET)
setup(
    ext_modules=[
        CppExtension(
            "pom_ext._C",
            [str(path) for path in sorted(Path("csrc/torch").glob("*.cpp"))],
            include_dirs=[os.path.abspath(path) for path in INCLUDE],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden"]},
            py_limited_api=True,
        ),
        Extension(
            "pom_ext._engine",
            ["csrc/python/engine.cpp"],
            include_dirs=[*(os.path.abspath(path) for path in INCLUDE), pybind11.get_include()],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden"],
            language="c++",
        ),
    ],
    cmdclass={"build_ext": Build, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
