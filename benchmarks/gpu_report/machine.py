"""Prints the GPU, driver and torch as JSON: `python -m benchmarks.gpu_report.machine`. A separate program, since a
hanging driver hangs its caller."""

import json
import os
import platform
import shutil
import subprocess
import sys
import warnings


def driver():
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    return subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip()


def describe():
    """Raises RuntimeError with one line if torch is missing or finds no GPU that it can use."""
    try:
        import torch
    except ModuleNotFoundError:
        raise RuntimeError(f"{sys.executable} has no torch; name one that has: make gpu-report PYTHON=...") from None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    if not is_there:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
        said = "".join(f". {' '.join(str(w.message).split())}" for w in warned if "CUDA" in str(w.message))
        raise RuntimeError(
            f"no GPU that torch can use: torch {torch.__version__}, {built}, sees none on this machine{said}"
        )
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }


def main():
    try:
        print(json.dumps(describe()))
    except RuntimeError as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
