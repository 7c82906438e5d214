"""CUDA errors after which every later call of the process fails with the message of the first.

Imports no torch, for the GPU report runs without it.
"""

import re

LOST = 3  # exit status of a process that met such an error: start another one, with --resume
FATAL = re.compile(
    "illegal memory access|CUDA error|launch failure|unspecified launch|misaligned address|illegal instruction|"
    "illegal address|device-side assert|hardware stack error|invalid program counter"
)


def is_fatal(text):
    return FATAL.search(text) is not None
