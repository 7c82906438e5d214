"""Cleans up after a killed report: ends the processes that it started, and removes its working folder.

A separate program that waits for its standard input to close, which happens however the report ends. It reads lines,
"+ PID" for a group of processes that begins and "- PID" for one that ends. Its argument is the folder.
"""

import os
import shutil
import signal
import subprocess
import sys


class Guard:
    """Starts this program. If it cannot be started, the report runs without it."""

    def __init__(self, folder):
        self._popen = None
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-IS", __file__, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a signal from the terminal must not stop this program
            )
        except OSError:
            pass

    def __call__(self, sign, pid):
        """Note that a group begins ("+") or ends ("-")."""
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
