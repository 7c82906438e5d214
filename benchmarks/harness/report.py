"""What every result file begins with, the machine, and how it is written."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import pom_ext
from pom_ext._io import atomic_write
from pom_ext.ops import _library

ROOT = Path(__file__).parents[2]


def processor():
    """Model name of the processor, from /proc/cpuinfo on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.processor()
    )


def commit():
    """The commit of the source folder, with "-modified" if files differ from it; None outside a repository."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-modified" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine():
    _library.load()
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": torch.ops.pom_ext.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "pom_ext": pom_ext.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
    }


def machine_line(m):
    version = f"commit {m['commit']}" if m["commit"] else f"pom_ext {m['pom_ext']}"
    gpu = f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, " if "gpu" in m else ""
    return (
        f"{gpu}{m['processor']}, {m['cores']} cores, {m['instruction_set']}, {m['threads']} threads, "
        f"torch {m['torch']}, {version}, {m['date']}, load {m['load']:.1f}"
    )


def begin(**more):
    """The content of a new result file: the machine, whose line is printed, then `more`."""
    content = {"machine": machine(), **more}
    print(machine_line(content["machine"]), flush=True)
    return content


def amount(size):
    """A number of bytes for people to read."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def save(content, path):
    """Write the result file anew, unless `path` is None. If that fails, say on a full disk, a line tells why."""
    if not path:
        return
    try:
        with atomic_write(path) as aside:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"--json: {path} could not be written: {error}", flush=True)
