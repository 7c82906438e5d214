"""The compiled library with the CUDA kernels as its operations, compiled as C++: what a GPU would do, on a CPU.

    python -m tools.stand_in build/stand_in [--counted]

builds it there, if it is not up to date, and prints its path. A process uses it in place of the installed library if it
calls `load` before it imports pom_ext; tests and `python -m benchmarks.gpu_report` do so for a path in the environment
variable POM_EXT_TEST_LIBRARY. A vector access at an address that a GPU would refuse ends the process. The counted one
tells which kernels ran and how many bytes of memory they moved, by the model in tests/cpp/count_on_cpu.cpp, and checks
no addresses; it is several times slower.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

from tools.build.objects import Job, compile_stale

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "POM_EXT_TEST_LIBRARY"
CHECKED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
# Linked without its library.
COUNTED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-Wno-tsan"]
TRANSFERS = {0: "cudaMemsetAsync", 1: "cudaMemcpyAsync"}  # in place of a kernel's address: kClear, kCopy


def jobs(folder, counted):
    """The compilations, the longest first."""
    compiler, cpp = os.environ.get("CXX", "g++"), ROOT / "tests/cpp"
    headers = [path for kind in ("h", "cuh", "hpp") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    headers += cpp.glob("*.h")
    common = ["-fPIC", "-fvisibility=hidden", *(f"-I{ROOT / name}" for name in ("csrc", "csrc/include", "tests/cpp"))]
    optimised = ["-std=c++17", "-O2", *common]
    kernels = ["-x", "c++", *(["-std=c++17", "-O1", *common, *COUNTED] if counted else [*optimised, *CHECKED])]
    target = re.search(r'^TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    torch = ["-std=c++20", "-O1", *common, "-DPOM_CUDA_ON_CPU", f"-DTORCH_TARGET_VERSION={target}"]
    torch += ["-DPy_LIMITED_API=0x030A0000", "-isystem", sysconfig.get_paths()["include"]]
    torch += [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    stand_in = [cpp / "cuda_on_cpu.cpp", ROOT / "csrc/status.cpp"] + [cpp / "count_on_cpu.cpp"] * counted
    groups = (
        ("cuda", sorted((ROOT / "csrc/cuda").glob("*.cu")), kernels),
        ("torch", (ROOT / "csrc/torch").glob("*.cpp"), torch),
        ("cpu", (ROOT / "csrc/cpu").glob("*.cpp"), ["-std=c++17", *common]),  # called with projections alone
        ("stand_in", stand_in, optimised),
    )
    found = [
        Job((compiler, *flags), source, folder / name / f"{source.stem}.o", tuple(headers))
        for name, sources, flags in groups
        for source in sources
    ]
    return sorted(found, key=lambda job: (job.target.parent.name != "cuda", -job.source.stat().st_size))


def build_library(folder, counted=False):
    """Bring the library in a folder up to date: as many compilers at once as MAX_JOBS says or there are cores.

    Returns its path. What compilers say goes to stderr; setuptools.errors.CompileError if one fails.
    """
    folder = Path(folder).resolve()
    wanted = jobs(folder, counted)
    with contextlib.redirect_stdout(sys.stderr):
        objects = compile_stale(wanted)
    library = folder / "_C.abi3.so"
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        torch = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        linked = library.with_suffix(".new")  # a process may have the old one loaded
        words = [*wanted[0].command[:1], "-shared", *objects, "-pthread", *torch, "-o", linked]
        subprocess.run([str(word) for word in words], check=True)
        linked.replace(library)
    return library


def load(path):
    """Make a library the one that pom_ext will use in this process. RuntimeError if it has one already."""
    if "pom_ext._C" in sys.modules:
        raise RuntimeError(f"{path}: pom_ext has loaded {sys.modules['pom_ext._C'].__file__}; load this one before it")
    spec = importlib.util.spec_from_file_location("pom_ext._C", path)
    sys.modules["pom_ext._C"] = importlib.util.module_from_spec(spec)


class _Row(ctypes.Structure):
    """CountedLaunch of tests/cpp/count_on_cpu.h."""

    _fields_ = (
        ("kernel", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("blocks", "threads")),
        *((name, ctypes.c_uint64) for name in ("loaded", "stored")),
    )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, or a cudaMemsetAsync or cudaMemcpyAsync, and the bytes of global memory that it moved."""

    kernel: str  # demangled
    blocks: int
    threads: int  # of a block
    loaded: int
    stored: int


class Counts:
    """What the counted library at a path has counted in this process since it was last asked to start over."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.count_on_cpu_launches.restype = ctypes.c_size_t
        self._library.count_on_cpu_launches.argtypes = ctypes.POINTER(_Row), ctypes.c_size_t
        listed = subprocess.run(["nm", "--demangle", path], check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^(\w+) [tTwW] (.*)$", listed, re.MULTILINE)
        self._names = TRANSFERS | {int(address, 16): name for address, name in found}

    def reset(self):
        self._library.count_on_cpu_reset()

    def launches(self):
        """[Launch], in order."""
        count = self._library.count_on_cpu_launches(None, 0)
        rows = (_Row * count)()
        self._library.count_on_cpu_launches(rows, count)
        return [Launch(self._names[row.kernel], row.blocks, row.threads, row.loaded, row.stored) for row in rows]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tools.stand_in", description=__doc__.split(":")[0])
    parser.add_argument("folder", help="where to build it")
    parser.add_argument("--counted", action="store_true", help="with counts of kernels and of the bytes they move")
    options = parser.parse_args(arguments)
    print(build_library(options.folder, options.counted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
