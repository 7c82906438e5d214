"""Compiles sources to object files, as many at once as there are cores, and only what has changed."""

import os
import re
import shlex
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

RESOURCES = re.compile(r"ptxas info|bytes stack frame")  # lines kept for a reader of the log, no message


@dataclass(frozen=True)
class Job:
    """One source to compile."""

    command: tuple  # without the source and the output
    source: Path
    target: Path  # beside it come a .command, and a .log of what the compiler said
    headers: tuple  # that make the object stale when they change
    keeps_ptx: bool = False  # of nvcc: beside the target, a file for each architecture

    def words(self):
        return [*map(str, self.command), "-c", str(self.source), "-o", str(self.target)]

    def is_stale(self):
        """Whether the object is missing, older than what it is made of, or made by another command."""
        remembered = self.target.with_suffix(".command")
        if not self.target.exists() or not remembered.exists() or remembered.read_text() != shlex.join(self.words()):
            return True
        return self.target.stat().st_mtime < max(path.stat().st_mtime for path in (self.source, *self.headers))

    def run(self):
        """Compile; raises CompileError with what the compiler said."""
        words, remembered, start = self.words(), self.target.with_suffix(".command"), time.time()
        remembered.unlink(missing_ok=True)  # an interrupted compiler leaves half an object
        print(shlex.join(words), flush=True)
        with tempfile.TemporaryDirectory(dir=self.target.parent) as folder:
            keep = ["--keep", "--keep-dir", folder] if self.keeps_ptx else []
            done = subprocess.run(
                words + keep, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for old in self.target.parent.glob(f"{self.target.stem}.*ptx"):
                old.unlink()
            for ptx in Path(folder).glob("*.ptx"):
                ptx.replace(self.target.parent / ptx.name)
        said = [line for line in done.stdout.splitlines() if not RESOURCES.search(line)]
        if said:
            print(*said, sep="\n", flush=True)
        if done.returncode:
            raise CompileError(f"{self.source} does not compile: {words[0]} ended with exit status {done.returncode}")
        os.utime(self.target, (start, start))  # older than what was saved while the compiler ran
        self.target.with_suffix(".log").write_text(done.stdout)
        remembered.write_text(shlex.join(words))


def workers():
    return int(os.environ.get("MAX_JOBS") or os.cpu_count())


def compile_stale(jobs):
    """Bring the objects of all jobs up to date. Returns their paths, in order."""
    stale = [job for job in jobs if job.is_stale()]
    for job in stale:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers()) as pool:
        list(pool.map(Job.run, stale))
    return [job.target for job in jobs]
