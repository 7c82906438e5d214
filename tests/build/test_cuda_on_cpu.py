"""The CUDA sources on a CPU: compiled as C++ and run by tests/cpp/cuda_on_cpu.h, so they are tested without a GPU.

First that stand-in itself, then the kernels in the C++ programs that test the CPU's, then both behind torch: a library
whose operations are the CUDA ones, and the ordinary tests of the operations with it.
"""

import os
import subprocess
import sys

import pytest
from cpp_programs import CPP, ROOT, call, compile_all, link_and_run, side_by_side

sys.path.insert(0, str(ROOT))  # tools are no part of the installed package

from tools import stand_in

# Buffers lie between inaccessible pages whatever the flags: the sanitizers look after local arrays and vector accesses.
SANITIZED = [
    *("-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=address,alignment", "-fno-sanitize-recover"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
]
OF_STAND_IN = ("test_cuda_on_cpu", "test_hopper_on_cpu")
# The stand-in tells the sanitizer of its fibers, and is not looked after itself.
STAND_IN = CPP / "cuda_on_cpu.cpp"
WITH_SANITIZER = ["-std=c++17", "-O2", "-fsanitize=address"]
WITH_SANITIZER += [word for kind in ("reads", "writes") for word in ("--param", f"asan-instrument-{kind}=0")]
PLAIN = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-pthread"]
# The longest first.
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda file: -file.stat().st_size)
PROGRAMS = (
    *("test_api", "test_mix", "test_project", "test_folded", "test_deal", "test_lookback", "test_offsets"),
    *("test_status", "test_engine", "test_engine_refusals"),
)
# The engine serves both devices; its tests here use the one that this is about.
OTHERS = [source for folder in (".", "cpu", "engine") for source in (ROOT / "csrc" / folder).glob("*.cpp")]

# Tests of the operations, the longest first.
OPERATIONS = (
    "mix",
    "derivatives",
    "state",
    "prior",
    "determinism",
    "update",
    "readout",
    "layouts",
    "rotary",
    "at_once",
)
OPERATIONS = [f"test_{name}" for name in (*OPERATIONS, "gpu_report_smoke")]
# The threads are those of the CPU kernels; memory is measured in processes of their own.
LEFT_OUT = "not threads and not memory"


def as_cpp(flags):
    return ["-x", "c++", *flags]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Futures of the object files by name."""
    jobs = {source.stem: (source, as_cpp(SANITIZED)) for source in KERNELS}
    jobs |= {name: (CPP / f"{name}.cpp", [*PLAIN, "-DPOM_TEST_CUDA"]) for name in PROGRAMS}
    jobs |= {name: (CPP / f"{name}.cpp", SANITIZED) for name in OF_STAND_IN} | {"stand_in": (STAND_IN, WITH_SANITIZER)}
    jobs |= {"test_ucontext": (CPP / "test_cuda_on_cpu.cpp", ["-std=c++17"])}
    jobs |= {"stand_in_ucontext": (STAND_IN, ["-std=c++17", "-DFIBER_UCONTEXT"])}
    jobs |= {f"other_{source.stem}": (source, [*PLAIN, "-DPOM_CUDA"]) for source in OTHERS}
    return compile_all(tmp_path_factory.mktemp("cuda_on_cpu"), jobs)


@pytest.mark.parametrize("name", OF_STAND_IN)
def test_the_stand_in(name, objects):
    link_and_run(objects[name], objects["stand_in"], flags=SANITIZED)


def test_the_stand_in_on_other_processors(objects):
    """Fibers by the C library, and nothing optimised."""
    link_and_run(objects["test_ucontext"], objects["stand_in_ucontext"], flags=["-pthread"])


@pytest.fixture(scope="module")
def programs(objects):
    """Futures of the programs, linked and run."""
    names = (*(source.stem for source in KERNELS), "stand_in", *(f"other_{source.stem}" for source in OTHERS))
    library = [objects[name] for name in names]

    def run(name):
        link_and_run(objects[name], *library, flags=SANITIZED)

    return side_by_side({name: (run, name) for name in PROGRAMS})


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels(name, programs):
    programs[name].result()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return stand_in.build_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def runs(library):
    """Futures of the tests of the operations, run side by side, with threads and blocks in random order."""
    environment = os.environ | {stand_in.VARIABLE: str(library), "CUDA_ON_CPU_SEED": "1", "OMP_NUM_THREADS": "1"}

    def run(name):
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT)
        call(*command, ROOT / f"tests/{name}.py", cwd=ROOT, env=environment)

    return side_by_side({name: (run, name) for name in OPERATIONS})


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, runs):
    runs[name].result()


def test_the_library_given_is_the_one_in_use(library):
    """Or the tests of the operations would have tested another one."""
    environment = os.environ | {stand_in.VARIABLE: str(library)}
    ask = "import conftest, pom_ext, sys; print(sys.modules['pom_ext._C'].__file__, pom_ext._library.ERROR)"
    answer = subprocess.run(
        (sys.executable, "-c", ask), cwd=ROOT / "tests", env=environment | {"PYTHONPATH": str(ROOT)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.stdout.split() == [str(library), "None"]
