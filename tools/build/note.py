"""Which torch a build is for, and the note that stays of it: pom_ext/_build.json, which `pom-ext doctor` reads."""

import json
import platform
import re
import subprocess
import sys
import sysconfig


def release(target):
    """The torch whose stable ABI is meant by a TORCH_TARGET_VERSION: "2.10" for 0x020a000000000000."""
    number = int(target, 16)
    return f"{number >> 56}.{number >> 48 & 255}"


def refuse_older_torch(version, target):
    """Ends the build, with the remedy, where the torch to build against has no such stable ABI."""
    minimum = release(target)
    if [int(n) for n in re.findall(r"\d+", version)[:2]] < [int(n) for n in minimum.split(".")]:
        sys.exit(
            f"pom_ext: torch {version} is too old to build against: {minimum} or later is needed. Update it with "
            f"pip install 'torch>={minimum}' in the environment of {sys.executable}, and build again"
        )


def write_note(path, version, torch, target, compiler, choice):
    """Write down what was built with what. Choice: a build_cuda.Choice, of the CUDA kernels."""
    nvcc = choice.toolkit and choice.toolkit.nvcc
    note = {
        "version": version,
        "torch": torch,
        "minimum_torch": release(target),
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "libc": " ".join(platform.libc_ver()),
        "compiler": _said([compiler, "--version"]).splitlines()[0],
        "cuda": nvcc and re.search(r"release ([\d.]+)", _said([nvcc, "--version"]))[1],
        "architectures": choice.names,
        "chosen": choice.why,
    }
    path.write_text(json.dumps(note, indent=2) + "\n")


def _said(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
