"""What the CUDA part of the library is built with: the toolkit, the architectures, the commands.

torch's own helper compiles .cu files only where torch itself was built with CUDA. These need no torch at all, so they
are compiled by the nvcc that is here and linked with the static CUDA runtime: one library for any torch.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import OptionError, PlatformError

from build_objects import Job

SOURCE = Path("csrc")
DEFAULT = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # the last one that nvcc knows also as PTX, for later GPUs
FLAGS = (
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc", "-Icsrc/include"),
    *("-Xptxas", "-v"),  # the log tells registers and spills of every kernel
    *("-Xfatbin", "-compress-all"),  # a quarter of the size
)
LIBRARIES = ("cudart_static", "dl", "rt", "pthread")


@dataclass(frozen=True)
class Toolkit:
    """A folder with include/cuda_runtime.h, bin/nvcc and the static runtime."""

    root: Path

    @property
    def nvcc(self):
        return self.root / "bin/nvcc"

    @property
    def libraries(self):
        """The folder of libcudart_static.a, or None."""
        folders = (self.root / "lib64", self.root / "lib", *sorted(self.root.glob("targets/*/lib")))
        return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)

    @property
    def missing(self):
        """The first thing that is not there, or None."""
        files = ("include/cuda_runtime.h", "bin/nvcc")
        absent = (file for file in files if not (self.root / file).exists())
        return next(absent, None if self.libraries else "lib64/libcudart_static.a")

    def architectures(self):
        """Those that this nvcc compiles for: {"8.0", "9.0", …}."""
        listed = subprocess.run([self.nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        return {f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", listed)}


def root_of(nvcc):
    """The toolkit's folder of an nvcc on the path: a file, a link, or a script that starts another one."""
    root = Path(nvcc).resolve().parent.parent
    if (root / "include/cuda_runtime.h").exists():
        return root
    asked = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], check=False, capture_output=True, text=True)
    told = re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.MULTILINE)
    return Path(told[1]).resolve() if told else root


def find_toolkit(environment=os.environ, default="/usr/local/cuda"):
    """(Toolkit or None, a line on each place that was looked at before and is none)."""

    def on_path():
        nvcc = shutil.which("nvcc", path=environment.get("PATH", ""))
        return nvcc and root_of(nvcc)

    places = {
        "CUDA_HOME": lambda: environment.get("CUDA_HOME"),
        "CUDA_PATH": lambda: environment.get("CUDA_PATH"),
        "nvcc on the path": on_path,
        "the usual folder": lambda: default,
    }
    refused = []
    for place, find in places.items():
        root = find()
        if not root:
            refused.append(f"{place}: none")
            continue
        toolkit = Toolkit(Path(root).resolve())
        if not toolkit.missing:
            return toolkit, refused
        refused.append(f"{place}: {root} has no {toolkit.missing}")
    return None, refused


def wanted_toolkit(environment=os.environ, default="/usr/local/cuda"):
    """The toolkit to build with, or None to build without CUDA. POM_EXT_CUDA=0 forbids it, 1 demands it."""
    choice = environment.get("POM_EXT_CUDA", "")
    if choice not in ("", "0", "1"):
        raise OptionError(f"POM_EXT_CUDA: expected 0 (without CUDA), 1 (with CUDA) or nothing, got {choice!r}")
    if choice == "0":
        return None
    toolkit, refused = find_toolkit(environment, default)
    if choice == "1" and toolkit is None:
        raise PlatformError(
            f"POM_EXT_CUDA=1, but there is no CUDA toolkit ({'; '.join(refused)}). Install one with nvcc, or set "
            "CUDA_HOME to the folder that holds include/cuda_runtime.h and bin/nvcc"
        )
    return toolkit


def architectures(known, environment=os.environ):
    """Architectures to compile for, as in TORCH_CUDA_ARCH_LIST ("9.0", "9.0a", "12.0+PTX"), of those in `known`."""
    given = re.split(r"[;\s]+", environment.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t"))
    if given == [""]:
        chosen = [name for name in DEFAULT if name in known]
        if not chosen:
            raise PlatformError(
                f"this nvcc compiles for none of {', '.join(DEFAULT)}: use a toolkit of CUDA 12 or later, or set "
                "POM_EXT_CUDA=0 to build without"
            )
        return tuple(chosen[:-1]) + (chosen[-1] + "+PTX",)
    for name in given:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if not match:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0a;12.0+PTX, apart by semicolons or spaces, "
                f"got {name!r}"
            )
        if match[1] not in known:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {name}, only for "
                f"{', '.join(sorted(known, key=float))}; leave it out or use another toolkit"
            )
    return tuple(dict.fromkeys(given))


def gencode(names):
    """nvcc's flags for these architectures: machine code, and with +PTX also what a later driver can translate."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        for code in ("sm", "compute")[: 1 + name.endswith("+PTX")]:
            # 9.0a is 9.0 with instructions that no later GPU has.
            exact = "90a" if (code, number) == ("sm", "90") else number
            flags += ["-gencode", f"arch=compute_{exact},code={code}_{exact}"]
    return flags


def jobs(toolkit, names, folder):
    """A compilation of each .cu. ptxas's account of registers and spills stays in the log, the PTX beside it."""
    patterns = ("*.h", "include/**/*.h", "cuda/*.h", "cuda/*.cuh")
    headers = tuple(path for pattern in patterns for path in SOURCE.glob(pattern))
    command = (toolkit.nvcc, *FLAGS, *gencode(names))
    sources = sorted(SOURCE.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size)  # the longest first
    return [Job(command, path, Path(folder) / f"{path.stem}.o", headers, keeps_ptx=True) for path in sources]
