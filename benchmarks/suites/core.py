"""Operations, memory and layers in one run: the cases of three suites."""

from ..harness import checked
from . import layers, memory, ops

CASES = {
    "cpu": ops.CASES["cpu"] | memory.CASES["cpu"] | layers.CASES["cpu"],
    "cuda": ops.CASES["cuda"] | layers.CASES["cuda"],
}


def main(arguments=None):
    return checked.run("core", CASES, arguments)
