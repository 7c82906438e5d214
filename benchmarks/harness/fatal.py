"""CUDA errors after which a process can do nothing more on its GPU: every later call fails with the first one's message.

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
