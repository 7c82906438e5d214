"""The folder of the report, and the files in it: five, two of an earlier one, and what is written aside."""

import fcntl
import json
import os
import runpy
import sys
import tempfile
from collections import deque
from pathlib import Path

from .run import ROOT

# Without torch, which importing pom_ext takes.
atomic_write = runpy.run_path(str(ROOT / "pom_ext/_io.py"))["atomic_write"]
FILES = ("report.json", "report.txt", "benchmark.json", "failed.txt", "log.txt")
EARLIER = {"report.json": "earlier-report.json", "report.txt": "earlier-report.txt"}
MARK = "pom_ext gpu-report"  # in report.json: whose files these are
LONGEST_LOG = 2**20  # characters of one process; of what is beyond them the last lines are kept
END_OF_LOG = 500
LEAST = 2**20  # bytes that a folder must take


def why_not(folder, pretended=False):
    """Why a folder cannot take a report, or None. Makes it if need be. Files of other names do not matter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [name for name in FILES if (folder / name).exists()]
        earlier = earlier_in(folder)
        if foreign and not earlier:
            return f"holds {', '.join(foreign)} of something else"
        if pretended and earlier and not earlier.get("pretended"):
            return "holds the report of a GPU, and this one pretends"
        if not lock(folder):
            return f"is in use: another report runs there (process {(earlier or {}).get('process', 'unknown')})"
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(bytes(LEAST))  # an empty file fits on a full disk
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"
    return None


LOCKS = {}  # {folder: file descriptor}: held until this process ends, however it does


def lock(folder):
    """Whether this process alone reports into a folder; True too if its file system knows no locks."""
    try:
        handle = LOCKS.get(folder) or os.open(folder, os.O_RDONLY)
        LOCKS[folder] = handle
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(LOCKS.pop(folder))
        return False
    except OSError:
        pass
    return True


def unlock(folder):
    if folder in LOCKS:
        os.close(LOCKS.pop(folder))


def earlier_in(folder):
    """What an earlier report in it holds, or None."""
    try:
        content = json.loads((folder / "report.json").read_text())
        return content if content.get("made_by") == MARK else None
    except (OSError, ValueError, AttributeError):
        return None


def found_something(report):
    """Whether it is worth keeping: not pretended, and some step was begun."""
    return not report.get("pretended") and any(step.get("status") != "not run" for step in report.get("steps", ()))


def prepared(folder, pretended=False):
    """(folder, a line or None): the folder, where an earlier report has made room, or another one if that cannot take
    it, so that a long way to a GPU was not for nothing."""
    why = why_not(folder, pretended)
    if why:
        unlock(folder)
        other = Path(tempfile.mkdtemp(prefix="gpu-report-"))
        lock(other)
        return other, f"{folder} {why}; the report goes to {other}"
    if found_something(earlier_in(folder) or {}):
        for name, kept in EARLIER.items():
            if (folder / name).exists():
                os.replace(folder / name, folder / kept)
    for name in FILES:
        for path in (folder / name, folder / f"{name}.tmp"):
            path.unlink(missing_ok=True)
    others = sorted({path.name for path in folder.iterdir()} - {*EARLIER.values()})
    return folder, f"{folder} holds other files too, which are left alone: {', '.join(others)}" if others else None


class Log:
    """log.txt: what all processes print, line by line as it comes, each with the name of its process."""

    def __init__(self, path, unwritten):
        self._path, self._unwritten = path, unwritten
        self._sizes, self._ends = {}, {}

    def __call__(self, name, text):
        line = f"{name}| {text}\n"
        self._sizes[name] = self._sizes.get(name, 0) + len(line)
        if self._sizes[name] <= LONGEST_LOG:
            self._write(line)
        else:
            self._ends.setdefault(name, deque(maxlen=END_OF_LOG)).append(line)

    def finish(self):
        """Write the ends of those who said too much."""
        for name, end in self._ends.items():
            self._write(f"{name}| (lines were left out here)\n{''.join(end)}")
        self._ends = {}

    def _write(self, text):
        try:
            with self._path.open("ab") as file:
                file.write(text.encode(errors="replace"))
        except OSError as error:
            self._unwritten(error)


def complain(text):
    print(f"gpu-report: {text}", file=sys.stderr, flush=True)
