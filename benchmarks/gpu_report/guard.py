"""Cleans up after a report that was killed: ends the processes that it had started, and removes its working folder.

A program of its own, which waits for its standard input to end: that happens however the report ends. It reads lines,
"+ PID" for a group that has begun and "- PID" for one that is over, and takes the folder as its argument.
"""

import os
import shutil
import signal
import subprocess
import sys


class Guard:
    """Starts that program. A report without one goes on all the same."""

    def __init__(self, folder):
        self._popen = None
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-IS", __file__, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what stops the report from a terminal must not stop this one
            )
        except OSError:
            pass

    def __call__(self, sign, pid):
        """A group has begun ("+") or is over ("-")."""
        if self._popen:
            try:
                os.write(self._popen.stdin.fileno(), f"{sign} {pid}\n".encode())
            except OSError:
                pass

    def close(self):
        if self._popen:
            self._popen.stdin.close()
            self._popen.wait()


def main():
    groups = set()
    for line in sys.stdin:
        sign, pid = line.split()
        (groups.add if sign == "+" else groups.discard)(int(pid))
    for pid in groups:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
