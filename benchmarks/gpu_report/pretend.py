"""The plan without a GPU: the same steps and the same files, but every process is a stub that does as it is told.

With POM_EXT_TEST_LIBRARY naming a library whose CUDA kernels run on the CPU (tests/build/test_cuda_on_cpu.py builds one), the
stubs of the smoke step, of the sanitizers and of Nsight Compute run the real programs on it.
"""

import sys
from dataclasses import dataclass, field

from .families import FAMILIES
from .plan import SANITIZERS, World

MODES = ("ok", "fail", "hang", "stuck", "crash", "lost", "absent", "refuse")
OF_STEP = {
    "smoke": tuple(f"smoke.{family}" for family in FAMILIES),
    "sanitizers": (*SANITIZERS, "memcheck_at_once"),
}
NAMES = (
    "machine",
    "build",
    "benchmark",
    "layers",
    "ncu",
    "tests",
    "rest",
    *OF_STEP,
    *(n for names in OF_STEP.values() for n in names),
)

TOOLS = ("ncu", "sanitizers", "memcheck", "racecheck", "synccheck")
ONLY_OF = {"absent": ("build", "tests", *TOOLS), "refuse": TOOLS}


def parsed_faults(text):
    """{name of a process: mode} of "tests=hang,smoke.project=crash". Raises ValueError.

    Modes: ok, fail, hang (an interrupt ends it), stuck (only a kill does), crash, lost (a CUDA error); of ncu and the
    sanitizers also refuse; of these, of build (nvcc) and of tests (hypothesis) absent.
    """
    faults = {}
    for word in filter(None, text.split(",")):
        name, _, mode = word.partition("=")
        if name not in NAMES or mode not in MODES:
            raise ValueError(f"expected NAME=MODE, names {', '.join(NAMES)}, modes {', '.join(MODES)}; got {word!r}")
        if mode in ONLY_OF and not name.startswith(ONLY_OF[mode]):
            raise ValueError(f"expected {mode} only of {', '.join(ONLY_OF[mode])}; got {word!r}")
        faults |= dict.fromkeys(OF_STEP.get(name, (name,)), mode)
    return faults


@dataclass
class Pretended(World):
    faults: dict = field(default_factory=dict)
    device = "cpu"
    pretended = True

    def missing(self):
        lacking = {"build": ["nvcc"], "tests": ["hypothesis"]}
        return {step: names for step, names in lacking.items() if self.faults.get(step) == "absent"}

    def program(self, name):
        step = {"compute-sanitizer": "memcheck"}.get(name, name)
        return None if self.faults.get(step) == "absent" else name

    def process(self, name, command, environment=None, line=lambda text: None, seconds=float("inf")):
        stub = (sys.executable, "-m", "benchmarks.gpu_report.stubs", name, self.faults.get(name, "ok"), *command)
        return super().process(name, stub, environment, line, seconds)
