"""Runs processes side by side and stops those that overrun: an interrupt, some seconds, then a kill.

One thread, and every wait has a limit: a process that hangs, even in the driver, cannot hang the caller.
"""

import ctypes
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10  # seconds between interrupt and kill, to say what was found
BEAT = 0.1  # seconds between two looks at the clock
TIMED_OUT = "timed out"
INTERRUPTED = "(its time is up: interrupted)"  # a line among its own: what it says after it is no reason
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


@dataclass
class Process:
    """A command to run. `line` is called with every line that it prints, as soon as it does."""

    name: str
    command: tuple
    environment: dict = field(default_factory=dict)
    line: Callable = lambda text: None
    seconds: float = float("inf")  # a limit of its own, within that of its step


def _in_a_group_of_its_own():
    """A group makes it possible to stop all its children; the signal stops it if its parent dies, even by a kill."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script's background job and its children ignore it
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Running:
    """A started process: `status` is None until it ends, then its exit status (-11: signal 11) or TIMED_OUT."""

    def __init__(self, process, until, grace, log, watch):
        self.process, self.status, self._log, self._grace, self._watch = process, None, log, grace, watch
        self._until = min(until, time.monotonic() + process.seconds)
        self._interrupted = self._killed = False
        self._rest, self.at_end = b"", False
        words = [str(word) for word in process.command]
        self._tell(f"$ {' '.join(words)}")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **process.environment}
        try:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self._popen = subprocess.Popen(
                words, cwd=ROOT, env=environment, **streams, preexec_fn=_in_a_group_of_its_own
            )
            self._watch("+", self._popen.pid)
            self.output = self._popen.stdout
            os.set_blocking(self.output.fileno(), False)
        except OSError as error:
            self._tell(str(error))
            self.status = 127

    def _tell(self, text):
        self._log(self.process.name, text)
        try:
            self.process.line(text)
        except Exception as error:  # noqa: BLE001 -- a line of a kind never seen must not stop the others
            self._log(self.process.name, f"(this line could not be read: {type(error).__name__}: {error})")

    def read(self):
        """Pass on the lines printed so far. False if there was no output."""
        try:
            data = os.read(self.output.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        self.at_end = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._tell(line.decode(errors="replace").rstrip("\r"))
        return not self.at_end

    def look(self):
        """Whether it has ended; stops it if its time is up."""
        now, code = time.monotonic(), self._popen.poll()
        if code is not None:
            self._finish(TIMED_OUT if self._interrupted else code)
        elif self._killed and now > self._until:
            self._finish(TIMED_OUT)  # not even a kill ends it: it hangs in the driver, and is left behind
        elif self._interrupted and not self._killed and now > self._until:
            self.kill()
        elif not self._interrupted and now > self._until:
            self._tell(INTERRUPTED)
            self._signal(signal.SIGINT)
            self._interrupted, self._until = True, now + self._grace
        return self.status is not None

    def kill(self):
        self._signal(signal.SIGKILL)
        self._killed, self._interrupted, self._until = True, True, time.monotonic() + self._grace / 2

    def _signal(self, number):
        try:
            os.killpg(self._popen.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def _finish(self, status):
        self._signal(signal.SIGKILL)  # what it started and left behind
        for _ in range(1000):  # 64 MiB at most: somebody else may hold the pipe, and go on
            if not self.read():
                break
        if self._rest:
            self._tell(self._rest.decode(errors="replace"))
        self.output.close()
        self._watch("-", self._popen.pid)
        self.status = status


def ignore(*arguments):
    pass


def run(processes, until, *, grace=GRACE, at_once=None, log=ignore, beat=ignore, watch=ignore):
    """Run processes, `at_once` at a time, until a time of time.monotonic(). Returns {name: status}.

    Processes that have not begun by then are TIMED_OUT too. log(name, line) is called with every line, beat({name:
    status}) regularly with the processes that have ended, watch("+" or "-", pid) when a group of processes begins or
    ends.
    """
    waiting, running, statuses = deque(processes), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < (at_once or len(processes)):
                process = waiting.popleft()
                if time.monotonic() >= until:
                    statuses[process.name] = TIMED_OUT
                    continue
                one = Running(process, until, grace, log, watch)
                if one.status is None:
                    running.append(one)
                else:
                    statuses[process.name] = one.status
            talking = {one.output: one for one in running if not one.at_end}
            for output in select.select(list(talking), [], [], BEAT)[0]:
                talking[output].read()
            for one in [one for one in running if one.look()]:
                running.remove(one)
                statuses[one.process.name] = one.status
            beat(statuses)
    finally:
        for one in running:  # where the caller itself is stopped
            one.kill()
    return statuses
