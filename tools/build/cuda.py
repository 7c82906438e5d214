"""What the CUDA part of the library is built with: the toolkit, the architectures, the commands.

`python -m tools.build.cuda` tells what a build here and now would compile for, and how to have it otherwise.

torch's own helper compiles .cu files only where torch itself was built with CUDA. These need no torch at all, so they
are compiled by the nvcc that is here and linked with the static CUDA runtime: one library for any torch.
"""

import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import OptionError, PlatformError

from tools.build.library import LIBRARY, sources
from tools.build.objects import Job

SOURCE = Path("csrc")
DEFAULT = tuple(LIBRARY["cuda_architectures"])  # the last one that nvcc knows also as PTX, for later GPUs
FLAGS = (
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc", "-Icsrc/include"),
    *("-Xptxas", "-v"),  # the log tells registers and spills of every kernel
    *LIBRARY["cuda_flags"],  # a quarter of the size
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
    """The toolkit to build with, or None to build without CUDA.

    POM_EXT_CUDA=0 forbids it; 1, or a list of architectures, demands it. "all" demands none: a wheel is built without
    nvcc too.
    """
    choice = environment.get("POM_EXT_CUDA", "")
    if choice not in ("", "0", "1", "gpu"):
        raise OptionError(
            f"POM_EXT_CUDA: expected 0 (without CUDA), 1 (with CUDA), gpu (with CUDA if a GPU is visible) or nothing, "
            f"got {choice!r}"
        )
    if choice == "0":
        return None
    toolkit, refused = find_toolkit(environment, default)
    listed = environment.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t")
    if toolkit is None and (choice == "1" or listed not in ("", "all")):
        asked = "POM_EXT_CUDA=1" if choice == "1" else f"TORCH_CUDA_ARCH_LIST={listed}"
        raise PlatformError(
            f"{asked}, but there is no CUDA toolkit ({'; '.join(refused)}). Install one with nvcc, or set "
            "CUDA_HOME to the folder that holds include/cuda_runtime.h and bin/nvcc"
        )
    return toolkit


def architectures(known, environment=os.environ):
    """Those that TORCH_CUDA_ARCH_LIST names ("9.0", "9.0a", "12.0+PTX", or "all"), which must be in `known`; or all."""
    given = re.split(r"[;\s]+", environment.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t"))
    if given == [""] or given == ["all"]:
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
                f"TORCH_CUDA_ARCH_LIST: expected all, or numbers such as 8.0;9.0a;12.0+PTX, apart by semicolons or "
                f"spaces, got {name!r}"
            )
        if match[1] not in known:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {name}, only for "
                f"{', '.join(sorted(known, key=float))}; leave it out or use another toolkit"
            )
    return tuple(dict.fromkeys(given))


def visible_gpus(environment=os.environ):
    """Compute capabilities of the GPUs that are here, {"9.0"}: as torch has them, or else as the driver's tool does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a first build comes before numpy, which torch misses
        import torch  # here: all else needs none

    if torch.version.cuda and torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        return {f"{major}.{minor}" for major, minor in capabilities}
    tool = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if tool is None or environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return set()
    command = (tool, "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # a tool without its driver, or a driver that hangs
        return set()
    return set(re.findall(r"^\d+\.\d$", told.stdout, re.MULTILINE))


def serving(gpus, known):
    """What to compile, of those in `known`, for these GPUs; nothing for one that is older than all of them.

    Machine code for a GPU runs on later ones of the same major version; on those of a later one only PTX does.
    """
    names = set()
    for gpu in gpus:
        major, minor = map(int, gpu.split("."))
        versions = [tuple(map(int, name.split("."))) for name in known]
        below = max((version for version in versions if version <= (major, minor)), default=None)
        if below:
            names.add("{}.{}".format(*below) + "+PTX" * (below[0] < major))
    plain = names - {name.removesuffix("+PTX") for name in names if name.endswith("+PTX")}
    return tuple(sorted(plain, key=lambda name: float(name.removesuffix("+PTX"))))


@dataclass(frozen=True)
class Choice:
    """Whether CUDA kernels are compiled, for what, and why so."""

    toolkit: Toolkit | None
    names: tuple  # of architectures, as in TORCH_CUDA_ARCH_LIST
    why: str

    def __str__(self):
        """One line, with the way to have it otherwise."""
        one = "TORCH_CUDA_ARCH_LIST=9.0 for one kind of GPU"
        if self.toolkit is None:
            return f"No CUDA kernels: {self.why}. To have them, with an nvcc: POM_EXT_CUDA=1, or {one}"
        names = ", ".join(self.names)
        return (
            f"CUDA kernels for {names} by {self.toolkit.nvcc}: {self.why}. Otherwise: {one}, "
            "TORCH_CUDA_ARCH_LIST=all for all, POM_EXT_CUDA=0 for none"
        )


def choose(environment=os.environ, default="/usr/local/cuda", gpus=visible_gpus):
    """What to build: as asked, or else for the GPUs that are here. Without any, for all, or with POM_EXT_CUDA=gpu none.

    Who runs pip where there is an nvcc but no GPU builds for another machine, as an image of a container.
    """
    wanted, toolkit = environment.get("POM_EXT_CUDA", ""), wanted_toolkit(environment, default)
    if wanted == "0":
        return Choice(None, (), "POM_EXT_CUDA=0")
    if toolkit is None:
        return Choice(None, (), "no CUDA toolkit is here")
    known = toolkit.architectures()
    if environment.get("TORCH_CUDA_ARCH_LIST", "").strip("; \t"):
        return Choice(toolkit, architectures(known, environment), "as TORCH_CUDA_ARCH_LIST says")
    here = gpus(environment)
    names, listed = serving(here, known), ", ".join(sorted(here, key=float))
    if names:
        return Choice(toolkit, names, f"for the GPU that is visible ({listed})")
    why = f"{toolkit.nvcc} compiles for none of the GPUs here ({listed})" if here else "no GPU is visible"
    if wanted == "gpu" or (here and wanted != "1"):
        return Choice(None, (), why)
    return Choice(toolkit, architectures(known, environment), f"{why}, so for all, which takes minutes")


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
    longest_first = sorted(sources("cuda"), key=lambda path: -path.stat().st_size)
    return [Job(command, path, Path(folder) / f"{path.stem}.o", headers, keeps_ptx=True) for path in longest_first]


if __name__ == "__main__":
    try:
        print(choose())
    except (OptionError, PlatformError) as error:
        raise SystemExit(f"error: {error}") from None
