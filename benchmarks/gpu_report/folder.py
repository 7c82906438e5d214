"""The folder of the report, and the files in it: five, and beside them for a moment what is written aside."""

import json
import os
import runpy
import sys
import tempfile
from collections import deque
from pathlib import Path

from .run import ROOT

# Without torch, which importing pom_ext takes.
written_aside = runpy.run_path(str(ROOT / "pom_ext/files.py"))["written_aside"]
FILES = ("report.json", "report.txt", "benchmark.json", "failed.txt", "log.txt")
MARK = "pom_ext gpu-report"  # in report.json: whose files these are
LONGEST_LOG = 2**20  # characters of one process; of what is beyond them the last lines are kept
END_OF_LOG = 500


def why_not(folder):
    """Why a folder cannot take a report, or None. Makes it if need be. Files of other names do not matter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [name for name in FILES if (folder / name).exists()]
        if foreign and not is_earlier(folder):
            return f"holds {', '.join(foreign)} of something else"
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"
    return None


def is_earlier(folder):
    """Whether it holds an earlier report."""
    try:
        return json.loads((folder / "report.json").read_text()).get("made_by") == MARK
    except (OSError, ValueError, AttributeError):
        return False


def prepared(folder):
    """(folder, a line or None): the folder without an earlier report, or another one if that cannot take it, so that a
    long way to a GPU was not for nothing."""
    why = why_not(folder)
    if why:
        other = Path(tempfile.mkdtemp(prefix="gpu-report-"))
        return other, f"{folder} {why}; the report goes to {other}"
    for name in FILES:
        for path in (folder / name, folder / f"{name}.tmp"):
            path.unlink(missing_ok=True)
    others = sorted(path.name for path in folder.iterdir())
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
